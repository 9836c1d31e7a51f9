use std::io::{BufRead, BufReader, Lines, Stdin, stdin};
use std::time::Instant;

use anyhow::Result;
use candle_core::Device;
use serde_json::json;
use tinyfusion::core::Error;

use crate::output::say;

/// The conversation of a worker: ready, then one answer per line `step`.
pub(super) struct Turns {
    lines: Lines<BufReader<Stdin>>,
    /// When the repetition that is running began.
    begun: Option<Instant>,
    /// Where the work is done, which has to be waited for.
    device: Device,
}

impl Turns {
    pub(super) fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            lines: BufReader::new(stdin()).lines(),
            begun: None,
        }
    }

    /// Answers for the repetition that has ended and waits for the next request; false at the end of input.
    pub(super) fn next(&mut self) -> tinyfusion::core::Result<bool> {
        self.device.synchronize()?;
        match self.begun.take() {
            None => say!("{}", json!({ "ready": true }))?,
            Some(begun) => say!("{}", json!({ "seconds": begun.elapsed().as_secs_f64() }))?,
        }
        match self
            .lines
            .next()
            .transpose()
            .map_err(|e| Error::run(format!("standard input: {e}")))?
            .as_deref()
        {
            None => return Ok(false),
            Some("step") => {}
            Some(other) => {
                return Err(Error::usage(format!(
                    "`{other}`: expected `step` or the end of input"
                )));
            }
        }
        self.begun = Some(Instant::now());
        Ok(true)
    }
}

/// Repeats `work` on demand.
pub(super) fn repeat(device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<()> {
    let mut turns = Turns::new(device);
    while turns.next()? {
        work()?;
    }
    Ok(())
}
