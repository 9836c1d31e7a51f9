/// Is told how a download goes on, and may stop it.
///
/// Every method has a body that does nothing; `()` is the progress that nobody watches.
pub trait Progress {
    /// So many files, of so many bytes together, will be downloaded: what the cache has is not counted.
    fn plan(&mut self, files: usize, bytes: u64) {
        let _ = (files, bytes);
    }

    /// A file of `bytes` bytes begins.
    fn file(&mut self, name: &str, bytes: u64) {
        let _ = (name, bytes);
    }

    /// So many bytes of the file are here, those of an earlier run included. Falls back if a part had to be thrown away.
    fn at(&mut self, bytes: u64) {
        let _ = bytes;
    }

    /// The file is whole, verified and in its place.
    fn done(&mut self) {}

    /// Asked before every wait and every piece: `true` ends the download with [`Error::Stopped`](tinyfusion_core::Error::Stopped).
    /// What has come is kept, and the next call goes on from there.
    fn stop(&self) -> bool {
        false
    }
}

impl Progress for () {}
