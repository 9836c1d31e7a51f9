use serde::{Deserialize, Serialize};

use crate::check::same_network;
use crate::hash::sha256;
use crate::{ImageSet, Result, Weights};

/// How images reach the network, as written beside everything that was computed from it.
pub const PREPROCESSING: &str = "uint8, TF1 bilinear to 299 x 299, (x - 128) / 128";

/// Changes when features of the same images and weights would.
pub(crate) const FORMAT: u32 = 1;

/// Where features or statistics come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// SHA-256 of the images: of the `.npz`, or over all files of a folder; several shards are joined by `+`.
    pub images_sha256: String,
    /// SHA-256 of the weight file.
    pub weights_sha256: String,
    /// [`Weights::content_sha256`]: the same for the same values in another container. Empty where nobody noted it.
    #[serde(default)]
    pub weights_content_sha256: String,
    /// [`PREPROCESSING`] of whoever made them.
    pub preprocessing: String,
    /// (height, width) of the images.
    pub size: [usize; 2],
    /// Warnings about the images.
    pub warnings: Vec<String>,
}

impl Provenance {
    /// Hashes `images`, to go through the network whose weight file has the given SHA-256.
    pub fn of(images: &ImageSet, weights_sha256: &str) -> Result<Self> {
        Ok(Self {
            images_sha256: images.sha256()?,
            weights_sha256: weights_sha256.to_owned(),
            weights_content_sha256: String::new(),
            preprocessing: PREPROCESSING.to_owned(),
            size: images.size(),
            warnings: images.warnings(),
        })
    }

    /// The same with both hashes of `weights`, so that another container of the same values counts as the same network.
    pub fn of_weights(images: &ImageSet, weights: &Weights) -> Result<Self> {
        Ok(Self {
            weights_content_sha256: weights.content_sha256().to_owned(),
            ..Self::of(images, weights.sha256())?
        })
    }

    /// Name under which features of the same images and weights are kept: a hash of all that they depend on.
    pub fn cache_key(&self) -> String {
        let [h, w] = self.size;
        let Self {
            images_sha256,
            weights_sha256,
            weights_content_sha256,
            preprocessing,
            ..
        } = self;
        let weights = match weights_content_sha256.is_empty() {
            true => weights_sha256,
            false => weights_content_sha256,
        };
        sha256(format!("{FORMAT} {images_sha256} {weights} {preprocessing} {h} {w}").as_bytes())
    }

    /// Whether both come from the same weights: of the same file, or of the same values.
    pub fn same_weights(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.weights_content_sha256, &other.weights_content_sha256);
        self.weights_sha256 == other.weights_sha256 || (!ours.is_empty() && ours == theirs)
    }

    /// `name` was computed with `weights`, which are called `file` in messages, and with our preprocessing.
    ///
    /// # Errors
    /// Otherwise, with both names.
    pub fn check_weights(&self, name: &str, file: &str, weights: &Weights) -> Result<()> {
        let ours = Self {
            images_sha256: String::new(),
            weights_sha256: weights.sha256().to_owned(),
            weights_content_sha256: weights.content_sha256().to_owned(),
            preprocessing: PREPROCESSING.to_owned(),
            size: self.size,
            warnings: Vec::new(),
        };
        same_network((name, self), (file, &ours))
    }

    /// Puts the images behind `other` behind these.
    pub(crate) fn append(&mut self, other: &Self) {
        self.images_sha256 = format!("{}+{}", self.images_sha256, other.images_sha256);
        add_new(&mut self.warnings, &other.warnings);
    }
}

/// Appends what is not there yet.
pub(crate) fn add_new<'a>(all: &mut Vec<String>, more: impl IntoIterator<Item = &'a String>) {
    for one in more {
        if !all.contains(one) {
            all.push(one.clone());
        }
    }
}
