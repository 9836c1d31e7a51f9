//! Ten steps are five, an interruption, and five more.
#![allow(clippy::unwrap_used)] // helpers of tests: a panic is a failure

mod common;

use std::fs::{self, OpenOptions};
use std::io::Write;

use common::{Problem, assert_same, checkpoints, config, files, interrupted_at, steps_of};
use tempfile::tempdir;
use tinyfusion_core::Error;
use tinyfusion_train::FitConfig;

#[test]
fn ten_steps_are_some_steps_an_interruption_and_the_rest() {
    let whole = tempdir().unwrap();
    let unbroken = Problem::new(config(10), 0).fit(whole.path()).unwrap();
    assert_eq!(checkpoints(whole.path()), ["step-000010"]);
    assert_eq!(steps_of(whole.path(), "metrics.jsonl"), [3, 6, 9, 10]);
    assert_eq!(
        steps_of(whole.path(), "history.jsonl"),
        (1..=10).collect::<Vec<_>>()
    );

    for at in 0..9 {
        let broken = tempdir().unwrap();
        let step = interrupted_at(
            Problem::new(config(10), 0)
                .stopping_at(at)
                .fit(broken.path()),
        );
        assert_eq!(step, at + 1);
        assert_eq!(checkpoints(broken.path()), [format!("step-{step:06}")]);
        // A new problem with new variables, as in a new process.
        let resumed = Problem::new(config(10), 0).fit(broken.path()).unwrap();
        assert_same(
            whole.path(),
            broken.path(),
            &format!("interrupted after {step}"),
        );
        for (name, t) in unbroken.averages.iter() {
            let other = resumed.averages.require(name).unwrap();
            let bits = |t: &candle_core::Tensor| -> Vec<u32> {
                t.flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap()
                    .iter()
                    .map(|v| v.to_bits())
                    .collect()
            };
            assert_eq!(bits(t), bits(other), "{name}");
        }
    }
}

#[test]
fn a_step_that_is_given_up_half_way_is_done_again() {
    let whole = tempdir().unwrap();
    Problem::new(config(10), 0).fit(whole.path()).unwrap();
    // Before the first step, after a checkpoint (of step 4), and in between.
    for at in [0, 4, 6] {
        let broken = tempdir().unwrap();
        let mut problem = Problem::new(config(10), 0);
        problem.stop_within = Some(at);
        assert_eq!(interrupted_at(problem.fit(broken.path())), at);
        let expected: Vec<String> = (at > 0)
            .then(|| format!("step-{at:06}"))
            .into_iter()
            .collect();
        assert_eq!(checkpoints(broken.path()), expected);
        Problem::new(config(10), 0).fit(broken.path()).unwrap();
        assert_same(whole.path(), broken.path(), &format!("within step {at}"));
    }
}

#[test]
fn the_steps_do_change_what_is_compared() {
    // What the test above relies on: nine steps leave other bytes than ten.
    let (nine, ten) = (tempdir().unwrap(), tempdir().unwrap());
    interrupted_at(Problem::new(config(10), 0).stopping_at(8).fit(nine.path()));
    Problem::new(config(10), 0).fit(ten.path()).unwrap();
    let (nine, ten) = (files(nine.path()), files(ten.path()));
    for name in ["model", "ema", "optimizer"] {
        assert_ne!(
            nine[&format!("checkpoints/step-000009/{name}.safetensors")],
            ten[&format!("checkpoints/step-000010/{name}.safetensors")],
            "{name}"
        );
    }
}

#[test]
fn many_interruptions_skipped_steps_among_them() {
    let problem = || {
        let mut problem = Problem::new(config(14), 0);
        problem.nan = |step| matches!(step, 0 | 3 | 4 | 9);
        problem
    };
    let (whole, broken) = (tempdir().unwrap(), tempdir().unwrap());
    let unbroken = problem().fit(whole.path()).unwrap();
    for at in [0, 3, 4, 5, 10] {
        assert_eq!(
            interrupted_at(problem().stopping_at(at).fit(broken.path())),
            at + 1
        );
    }
    let resumed = problem().fit(broken.path()).unwrap();
    assert_eq!((unbroken.skipped, resumed.skipped), (4, 4));
    assert!(resumed.seconds > 0.0);
    assert_same(whole.path(), broken.path(), "five interruptions");
}

#[test]
fn a_ramp_up_of_the_averages_goes_on_where_it_stopped() {
    let settings = || FitConfig {
        ema: 0.999,
        ema_rampup: Some(0.2),
        ..config(14)
    };
    let problem = || {
        let mut problem = Problem::new(settings(), 0);
        problem.nan = |step| matches!(step, 0 | 5); // it counts updates, not steps
        problem
    };
    let (whole, broken) = (tempdir().unwrap(), tempdir().unwrap());
    problem().fit(whole.path()).unwrap();
    for at in [1, 5, 10] {
        assert_eq!(
            interrupted_at(problem().stopping_at(at).fit(broken.path())),
            at + 1
        );
    }
    problem().fit(broken.path()).unwrap();
    assert_same(whole.path(), broken.path(), "three interruptions");

    // It does change the averages, and another one is another run.
    let plain = tempdir().unwrap();
    let without = FitConfig {
        ema_rampup: None,
        ..settings()
    };
    let mut problem = Problem::new(without.clone(), 0);
    problem.nan = |step| matches!(step, 0 | 5);
    problem.fit(plain.path()).unwrap();
    let ema = "checkpoints/step-000014/ema.safetensors";
    assert_ne!(files(whole.path())[ema], files(plain.path())[ema]);
    let error = Problem::new(without, 0).fit(whole.path()).unwrap_err();
    assert!(error.to_string().contains("ema-rampup"), "{error}");
}

#[test]
fn logs_are_cut_back_to_the_checkpoint() {
    let (whole, broken) = (tempdir().unwrap(), tempdir().unwrap());
    Problem::new(config(10), 0).fit(whole.path()).unwrap();
    interrupted_at(
        Problem::new(config(10), 0)
            .stopping_at(5)
            .fit(broken.path()),
    );
    let append = |name: &str, text: &[u8]| {
        let file = OpenOptions::new()
            .append(true)
            .open(broken.path().join(name));
        file.unwrap().write_all(text).unwrap();
    };
    // What a process that was killed two steps later would have left, its last line cut short: once inside
    // a character, once as a number that happens to parse.
    append(
        "history.jsonl",
        b"{\"out\":0.5,\"step\":7}\n{\"out\":0.5,\"step\":8,\"\xc3",
    );
    append(
        "metrics.jsonl",
        b"{\"loss\":0.5,\"step\":8,\"seconds\":1}\n1",
    );
    Problem::new(config(10), 0).fit(broken.path()).unwrap();
    assert_same(whole.path(), broken.path(), "logs ahead of the checkpoint");

    // Killed before its first checkpoint: everything is written again.
    let early = tempdir().unwrap();
    fs::write(
        early.path().join("history.jsonl"),
        "{\"step\":1}\n{\"step\":2}\n{\"st",
    )
    .unwrap();
    Problem::new(config(10), 0).fit(early.path()).unwrap();
    assert_same(whole.path(), early.path(), "logs without a checkpoint");
}

#[test]
fn a_finished_run_is_not_trained_again_and_its_averages_come_back() {
    let folder = tempdir().unwrap();
    let first = Problem::new(config(6), 0).fit(folder.path()).unwrap();
    let before = files(folder.path());
    let again = Problem::new(config(6), 0);
    again.stop.request();
    let second = again.fit(folder.path()).unwrap();
    assert!(before == files(folder.path()));
    assert_eq!(first.seconds, second.seconds);
    let read = |o: &tinyfusion_train::Outcome| {
        o.averages.require("out").unwrap().to_vec2::<f32>().unwrap()
    };
    assert_eq!(read(&first), read(&second));
}

#[test]
fn the_number_of_threads_does_not_show() {
    let (one, four) = (tempdir().unwrap(), tempdir().unwrap());
    for (threads, folder) in [(1, &one), (4, &four)] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        // Enough parameters that updates and norms are spread over threads.
        pool.install(|| Problem::new(config(5), 100_000).fit(folder.path()))
            .unwrap();
    }
    assert_same(one.path(), four.path(), "one and four threads");
}

#[test]
fn a_run_with_more_steps_than_asked_for_is_refused() {
    let folder = tempdir().unwrap();
    Problem::new(config(6), 0).fit(folder.path()).unwrap();
    fs::remove_file(folder.path().join("config.toml")).unwrap();
    let error = Problem::new(config(5), 0).fit(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Usage(_)), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("6 steps") && text.contains("the 5 asked for"),
        "{text}"
    );
}
