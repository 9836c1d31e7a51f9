#![doc = include_str!("../README.md")]

mod folder;
mod latents;
mod order;
mod source;
mod uint8;

pub mod shapes;

pub use source::Source;

pub use folder::{Augment, ImageFolder, center_crop};
pub use latents::{
    Damage, INDEX_FILE, LatentContent, LatentIndex, LatentType, LatentWriter, NpyLatents,
    PackedLatents, Shard, ShardWriter, ShardedLatents,
};

pub use order::{Loader, Order, batch_indices};
pub use uint8::{grid, to_uint8};
