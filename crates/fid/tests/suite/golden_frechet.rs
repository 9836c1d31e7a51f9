//! `frechet.safetensors`: the truth is f64 by the nuclear norm or in closed form.

use tinyfusion_fid::{Accumulator, FeatureMatrix, Gaussian, Statistics, frechet_distance};

use crate::golden_file::{Golden, all_close, close};

fn cases(golden: &Golden) -> Vec<String> {
    let cases: Vec<String> = golden.metadata["cases"]
        .split(',')
        .map(str::to_owned)
        .collect();
    assert!(!cases.is_empty());
    cases
}

#[test]
fn golden_frechet_from_features() {
    let golden = Golden::open("frechet.safetensors");
    let mut compared = 0;
    for case in cases(&golden)
        .iter()
        .filter(|case| golden.has(&format!("{case}.x1")))
    {
        let (x1, x2) = (
            golden.matrix(&format!("{case}.x1")),
            golden.matrix(&format!("{case}.x2")),
        );
        let first = Gaussian::from_features(x1.view()).unwrap();
        let second = Gaussian::from_features(x2.view()).unwrap();
        let found = frechet_distance(&first, &second).unwrap();
        close(
            case,
            found.distance,
            golden.f64(&format!("{case}.fd")),
            1e-9,
            1e-9,
        );
        close(
            case,
            found.trace_sqrt,
            golden.f64(&format!("{case}.trace_sqrt")),
            1e-9,
            1e-9,
        );
        // The second opinions, as far as their own error allows (they are too low where N <= D).
        let full_rank = x1.rows.min(x2.rows) > x1.columns && !case.contains("dead");
        let (relative, absolute) = if full_rank {
            (1e-7, 1e-7)
        } else {
            (1e-5, 2e-4)
        };
        for opinion in ["fd_scipy", "fd_torchfid", "fd_eigh"] {
            close(
                &format!("{case}.{opinion}"),
                found.distance,
                golden.f64(&format!("{case}.{opinion}")),
                relative,
                absolute,
            );
        }
        compared += 1;
    }
    assert!(compared > 0);
}

#[test]
fn golden_frechet_from_statistics() {
    let golden = Golden::open("frechet.safetensors");
    let mut compared = 0;
    for case in cases(&golden)
        .iter()
        .filter(|case| golden.has(&format!("{case}.sigma1")))
    {
        let [first, second] = [1, 2].map(|side| {
            let statistics = Statistics::from_parts(
                None,
                golden.f64s(&format!("{case}.mu{side}")),
                golden.f64s(&format!("{case}.sigma{side}")),
            );
            Gaussian::from_statistics(&statistics.unwrap()).unwrap()
        });
        let found = frechet_distance(&first, &second).unwrap();
        close(
            case,
            found.distance,
            golden.f64(&format!("{case}.fd")),
            1e-9,
            1e-9,
        );
        compared += 1;
    }
    assert!(compared > 0);
}

/// Statistics taken here equal numpy's, streamed in uneven batches, and give the same distance.
#[test]
fn golden_frechet_statistics() {
    let golden = Golden::open("frechet.safetensors");
    for case in cases(&golden)
        .iter()
        .filter(|case| golden.has(&format!("{case}.x1")))
    {
        let [first, second] = [1, 2].map(|side| {
            let x = golden.matrix(&format!("{case}.x{side}"));
            let mut sums = Accumulator::new(x.columns).unwrap();
            for batch in x.values.chunks(7 * x.columns) {
                sums.push(FeatureMatrix::new(batch, batch.len() / x.columns, x.columns).unwrap())
                    .unwrap();
            }
            let statistics = sums.finish().unwrap();
            assert_eq!(statistics.n(), Some(x.rows as u64));
            all_close(
                case,
                statistics.mean(),
                &golden.f64s(&format!("{case}.mu{side}")),
                1e-12,
            );
            let sigma = format!("{case}.sigma{side}");
            if golden.has(&sigma) {
                all_close(&sigma, statistics.covariance(), &golden.f64s(&sigma), 1e-12);
            } else {
                let diagonal: Vec<f64> = statistics
                    .covariance()
                    .iter()
                    .step_by(x.columns + 1)
                    .copied()
                    .collect();
                let sigma = format!("{sigma}_diag");
                all_close(&sigma, &diagonal, &golden.f64s(&sigma), 1e-12);
            }
            Gaussian::from_statistics(&statistics).unwrap()
        });
        let found = frechet_distance(&first, &second).unwrap();
        close(
            case,
            found.distance,
            golden.f64(&format!("{case}.fd")),
            1e-9,
            1e-9,
        );
    }
}
