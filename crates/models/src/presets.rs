use tinyfusion_core::{Error, Result};

use crate::DiTConfig;

/// A published size of a family whose sizes are a `C`.
#[derive(Debug, Clone)]
pub struct Preset<C = DiTConfig> {
    /// Its name, for example `DiT-XL/2`.
    pub name: String,
    /// Its sizes, on 256×256 ImageNet latents (32×32×4).
    pub config: C,
}

/// What the sizes S to XL are, in DiT and in SiT.
pub(crate) struct Size {
    name: &'static str,
    hidden_size: usize,
    depth: usize,
    num_heads: usize,
}

impl Size {
    const fn new(name: &'static str, hidden_size: usize, depth: usize, num_heads: usize) -> Self {
        Self {
            name,
            hidden_size,
            depth,
            num_heads,
        }
    }

    /// This size of `family` with every patch.
    pub(crate) fn presets(&self, family: &str) -> impl Iterator<Item = Preset> {
        [2, 4, 8].into_iter().map(move |patch_size| Preset {
            name: format!("{family}-{}/{patch_size}", self.name),
            config: DiTConfig {
                patch_size,
                hidden_size: self.hidden_size,
                depth: self.depth,
                num_heads: self.num_heads,
                ..DiTConfig::default()
            },
        })
    }
}

/// Name, width, depth, heads: Peebles & Xie 2023, table 1.
pub(crate) const SIZES: [Size; 4] = [
    Size::new("S", 384, 12, 6),
    Size::new("B", 768, 12, 12),
    Size::new("L", 1024, 24, 16),
    Size::new("XL", 1152, 28, 16),
];

/// Depths cut from DiT-XL/2: TinyFusion, table 1.
const SHALLOW: [usize; 3] = [19, 14, 7];

/// Every preset of DiT, largest patch last within a size.
pub fn presets() -> Vec<Preset> {
    let sizes = SIZES.iter().flat_map(|size| size.presets("DiT"));
    let shallow = SHALLOW.map(|depth| Preset {
        name: format!("DiT-D{depth}/2"),
        config: DiTConfig::default().with_depth(depth),
    });
    sizes.chain(shallow).collect()
}

/// The preset of DiT called `name` (case does not matter).
pub fn preset(name: &str) -> Result<DiTConfig> {
    find(presets(), name)
}

/// The sizes of the one of `all` that is called `name`.
pub(crate) fn find<C>(all: Vec<Preset<C>>, name: &str) -> Result<C> {
    let names: Vec<String> = all.iter().map(|p| p.name.clone()).collect();
    match all.into_iter().find(|p| p.name.eq_ignore_ascii_case(name)) {
        Some(p) => Ok(p.config),
        None => Err(Error::usage(format!(
            "no model is called `{name}`; there are {}",
            names.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SiTConfig;

    #[test]
    fn parameter_counts_are_the_published_ones() {
        // Millions, as printed in the DiT and TinyFusion papers.
        for (name, millions) in [
            ("DiT-S/2", 33),
            ("DiT-B/2", 130),
            ("DiT-L/2", 458),
            ("DiT-XL/2", 675),
            ("DiT-D19/2", 459),
            ("DiT-D14/2", 340),
            ("DiT-D7/2", 173),
        ] {
            let config = preset(name).unwrap();
            config.validate().unwrap();
            let found = config.parameters() as f64 / 1e6;
            assert!(
                (found - f64::from(millions)).abs() < 1.0,
                "{name}: {found} M, published {millions} M"
            );
        }
    }

    #[test]
    fn sit_has_the_sizes_of_dit() {
        let all = SiTConfig::presets();
        assert_eq!(all.len(), 12);
        for Preset { name, config } in all {
            config.validate().unwrap();
            assert_eq!(config.0, preset(&name.replace("SiT", "DiT")).unwrap());
            assert_eq!(config, SiTConfig::preset(&name.to_lowercase()).unwrap());
        }
        let error = SiTConfig::preset("DiT-S/2").unwrap_err().to_string();
        assert!(error.contains("SiT-S/2"), "{error}");
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = preset("DiT-XXL/2").unwrap_err().to_string();
        assert!(
            error.contains("DiT-XL/2") && error.contains("DiT-D14/2"),
            "{error}"
        );
    }
}
