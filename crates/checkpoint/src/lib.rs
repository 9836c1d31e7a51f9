#![doc = include_str!("../README.md")]

mod atomic;
mod blocks;
mod checkpoint;
mod dtype;
mod hash;
mod header;
mod inspect;
mod load;
mod model_dir;
mod narrow;
mod provenance;
mod root;
mod save;
mod space;
mod torch;
mod weight_file;
mod weight_names;
mod window;

pub use atomic::{remove_partials, write_atomic, write_folder};
pub use blocks::{block_of, keep_blocks};
pub use checkpoint::{Checkpoint, Format};
pub use dtype::DTypePolicy;
pub use hash::sha256_file;
pub use inspect::{Inspection, TensorEntry, inspect, inspect_root};
pub use load::{Loaded, load, load_as, load_expected};
pub use model_dir::{
    CONFIG_FILE, LoadedModel, WEIGHTS_FILE, load_model_dir, save_model_dir, save_model_dir_with,
};
pub use narrow::keep_groups;
pub use provenance::{Narrowed, Provenance};
pub use root::Root;
pub use save::{Metadata, save, save_torch};
pub use space::{free_space, require_space};
pub use weight_names::Weights;
