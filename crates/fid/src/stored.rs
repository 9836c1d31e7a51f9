use std::io::{self, Cursor, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::{Error, FeatureSet, Npz, Provenance, Result, Statistics};

/// Reference statistics as a file holds them: `mu` and `sigma` of FID, in ADM's files also `mu_s` and `sigma_s` of
/// sFID.
#[derive(Debug, Clone)]
pub struct StoredStatistics {
    /// Of the 2048 features of FID.
    pub pool: Statistics,
    /// Of the 2023 features of sFID.
    pub spatial: Option<Statistics>,
    /// Where they come from; only files of `tinyfusion stats` say so.
    pub provenance: Option<Provenance>,
    /// What in the file was not understood and left aside.
    pub warnings: Vec<String>,
}

impl StoredStatistics {
    /// Those of a set of features.
    pub fn of(features: &FeatureSet) -> Result<Self> {
        let (pool, spatial) = features.statistics()?;
        Ok(Self {
            pool,
            spatial,
            provenance: Some(features.provenance.clone()),
            warnings: Vec::new(),
        })
    }

    /// Those of an `.npz`, or `None` if it has no `mu`.
    ///
    /// # Errors
    /// When an array is malformed or no mean and covariance.
    pub fn read(npz: &mut Npz) -> Result<Option<Self>> {
        if !npz.has("mu") {
            return Ok(None);
        }
        let mut warnings = Vec::new();
        let n = match npz.has("n") {
            true => count(npz, &mut warnings)?,
            false => None,
        };
        let provenance = match npz.has("provenance") {
            true => match npz.bytes("provenance") {
                Ok((_, json)) => {
                    let parsed = serde_json::from_slice(&json);
                    Some(
                        parsed
                            .map_err(|e| Error::file(npz.path(), format!("`provenance`: {e}")))?,
                    )
                }
                Err(error) => {
                    warnings.push(format!("{error}; `provenance` is left aside"));
                    None
                }
            },
            false => None,
        };
        let pool = statistics(npz, "mu", "sigma", n)?;
        let spatial = match npz.has("mu_s") {
            true => Some(statistics(npz, "mu_s", "sigma_s", n)?),
            false => None,
        };
        Ok(Some(Self {
            pool,
            spatial,
            provenance,
            warnings,
        }))
    }

    /// Writes an `.npz` that ADM's evaluator, pytorch-fid and [`read`](Self::read) take: `mu`, `sigma`, `mu_s`,
    /// `sigma_s` in f64, and beside them `n` and `provenance` (JSON as uint8).
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let mut sets = vec![("mu", "sigma", &self.pool)];
        sets.extend(self.spatial.as_ref().map(|s| ("mu_s", "sigma_s", s)));
        for (mu, sigma, statistics) in sets {
            let d = statistics.columns();
            add(
                &mut zip,
                mu,
                "<f8",
                &format!("({d},)"),
                &le(statistics.mean()),
            )?;
            add(
                &mut zip,
                sigma,
                "<f8",
                &format!("({d}, {d})"),
                &le(statistics.covariance()),
            )?;
        }
        if let Some(n) = self.pool.n() {
            add(&mut zip, "n", "<i8", "()", &n.to_le_bytes())?;
        }
        if let Some(provenance) = &self.provenance {
            let json = serde_json::to_vec(provenance)?;
            add(
                &mut zip,
                "provenance",
                "|u1",
                &format!("({},)", json.len()),
                &json,
            )?;
        }
        let bytes = zip.finish().map_err(io::Error::other)?.into_inner();
        out.write_all(&bytes)
    }
}

/// The number of images `n`: one whole number, also as a float. Something else of that name is another tool's and not
/// ours to judge; a number that cannot be a count is damage.
fn count(npz: &mut Npz, warnings: &mut Vec<String>) -> Result<Option<u64>> {
    let found = npz.number("n");
    let found = found.map(|n| (n >= 2.0 && n.fract() == 0.0 && n < 9e15, n));
    match found {
        Ok((true, n)) => Ok(Some(n as u64)),
        Ok((false, n)) => Err(Error::file(
            npz.path(),
            format!(
                "`n`, the number of images behind the statistics, is {n}; expected a whole number from 2 on. Compute them again, or leave `n` out"
            ),
        )),
        Err(error) => {
            warnings.push(format!(
                "{error}; `n` is left aside, so the number of images is unknown"
            ));
            Ok(None)
        }
    }
}

fn statistics(npz: &mut Npz, mu: &str, sigma: &str, n: Option<u64>) -> Result<Statistics> {
    let (mean_shape, mean) = npz.floats(mu)?;
    let (shape, covariance) = npz.floats(sigma)?;
    let failed = |message: String| Error::file(npz.path(), message);
    match (&mean_shape[..], &shape[..]) {
        ([d], [rows, columns]) if d == rows && d == columns => {}
        _ => {
            return Err(failed(format!(
                "`{mu}` is {mean_shape:?} and `{sigma}` {shape:?}; expected (D) and (D, D)"
            )));
        }
    }
    Statistics::from_parts(n, mean, covariance)
        .map_err(|e| failed(format!("`{mu}`, `{sigma}`: {e}")))
}

fn le(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// One array of version 1.0, stored.
fn add(
    zip: &mut ZipWriter<Cursor<Vec<u8>>>,
    name: &str,
    descr: &str,
    shape: &str,
    data: &[u8],
) -> io::Result<()> {
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    zip.start_file(format!("{name}.npy"), options)
        .map_err(io::Error::other)?;
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    // The numbers begin at a multiple of 64 bytes, as numpy lays them.
    let length = (10 + header.len() + 1).next_multiple_of(64) - 10;
    header.extend(std::iter::repeat_n(' ', length - 1 - header.len()));
    header.push('\n');
    zip.write_all(b"\x93NUMPY\x01\x00")?;
    zip.write_all(&(length as u16).to_le_bytes())?;
    zip.write_all(header.as_bytes())?;
    zip.write_all(data)
}
