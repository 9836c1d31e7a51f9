#![doc = include_str!("../README.md")]

mod cache;
mod client;
mod download;
mod explain;
mod failure;
mod folders;
mod hashes;
mod hub;
mod lock;
mod path;
mod progress;
mod selection;
mod settings;

pub use hub::{Folder, Hub, Listed, resolve};
pub use lock::{Lock, Pinned};
pub use path::HubPath;
pub use progress::Progress;
pub use selection::Selection;
pub use settings::{Settings, Token};
