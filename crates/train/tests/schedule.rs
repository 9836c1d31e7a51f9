//! Learning rates over any run.

use proptest::prelude::*;
use tinyfusion_train::LrSchedule;

#[test]
fn the_numbers_of_the_distillers_schedule() {
    // 2e-4 → 1e-4 over a half cosine: half-way it is the mean.
    let lr = LrSchedule {
        peak: 2e-4,
        last: 1e-4,
        warmup: 0,
    };
    assert_eq!(lr.at(0, 101), 2e-4);
    assert!((lr.at(50, 101) - 1.5e-4).abs() < 1e-18);
    assert!((lr.at(25, 101) - (1e-4 + 0.5e-4 * (1.0 + 0.5f64.sqrt()))).abs() < 1e-18);
    assert_eq!(lr.at(100, 101), 1e-4);
}

proptest! {
    // What was found once belongs into a test of its own, not into a file that nobody reads.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rises_in_a_line_then_falls_to_the_last_rate(
        peak in 1e-8f64..10.0,
        share in 0.0f64..=1.0,
        warmup in 0u64..2_000,
        after in 2u64..100_000,
        at in 0.0f64..1.0,
    ) {
        let lr = LrSchedule { peak, last: share * peak, warmup };
        let total = warmup + after;
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * peak;

        // The rise: never 0, straight, up to the peak.
        if warmup > 0 {
            prop_assert!(near(lr.at(0, total), peak / warmup as f64));
            prop_assert_eq!(lr.at(warmup - 1, total), peak);
            let s = (at * warmup as f64) as u64;
            prop_assert!(near(lr.at(s, total), (s + 1) as f64 * lr.at(0, total)));
        }
        // The fall: from the peak to the last rate, never upwards, symmetric about its middle.
        prop_assert!(near(lr.at(warmup, total), peak));
        prop_assert!(near(lr.at(total - 1, total), lr.last));
        let s = warmup + (at * (after - 1) as f64) as u64;
        let (here, next) = (lr.at(s, total), lr.at(s + 1, total));
        prop_assert!(next <= here && here <= peak * (1.0 + 1e-12) && next >= lr.last - 1e-12 * peak);
        let mirrored = lr.at(total - 1 - (s - warmup), total);
        prop_assert!(near(here + mirrored, peak + lr.last));
        // Beyond the end it stays.
        prop_assert!(near(lr.at(total + 1_000, total), lr.last));
    }

    #[test]
    fn is_finite_and_within_bounds_for_any_run(
        warmup in any::<u64>(), step in 0..u64::MAX, total in any::<u64>(),
    ) {
        let rate = LrSchedule { peak: 1.0, last: 0.25, warmup }.at(step, total);
        prop_assert!(rate > 0.0 && rate <= 1.0 && (step < warmup || rate >= 0.25));
    }

    #[test]
    fn a_constant_rate_is_constant(lr in 0.0f64..10.0, step in any::<u64>(), total in any::<u64>()) {
        prop_assert_eq!(LrSchedule::constant(lr).at(step, total), lr);
    }
}
