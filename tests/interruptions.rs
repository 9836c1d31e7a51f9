//! Kill and interrupt in the middle: the end state is that of the unbroken run, bit for bit.
#![allow(clippy::unwrap_used)] // a test may panic

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tinyfusion_tests::{Place, partials};

/// Waits until `folder` holds at least `count` lines in metrics.jsonl.
fn wait_for_steps(folder: &Path, count: usize) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(60) {
        let lines = std::fs::read_to_string(folder.join("metrics.jsonl"))
            .unwrap_or_default()
            .lines()
            .count();
        if lines >= count {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("{} did not reach {count} steps", folder.display());
}

/// Lines of a log without the one field that is a clock.
fn log(place: &Place, name: &str) -> Vec<serde_json::Value> {
    place
        .text(name)
        .lines()
        .map(|l| {
            let mut value: serde_json::Value = serde_json::from_str(l).unwrap();
            value.as_object_mut().unwrap().remove("seconds");
            value
        })
        .collect()
}

#[test]
fn learn_survives_kill_9() {
    let place = Place::with_teacher();
    let flags = "--pattern 1:2 --steps 150 --batch-size 8 --checkpoint-every 1 --log-every 1";
    place.ok(&format!("learn teacher/model whole {flags}"));
    // Checkpoints are written all the time, so that kills hit their writing too.
    for after in [1, 7, 20, 33] {
        let mut child = place.start(&format!("learn teacher/model broken {flags}"));
        wait_for_steps(&place.path("broken"), after);
        child.kill().unwrap();
        assert_eq!(
            child.wait().unwrap().signal(),
            Some(9),
            "it was still running"
        );
    }
    place.ok(&format!("learn teacher/model broken {flags}"));
    assert_eq!(
        place.text("whole/selection.json"),
        place.text("broken/selection.json")
    );
    assert_eq!(
        place.text("whole/history.jsonl"),
        place.text("broken/history.jsonl")
    );
    assert_eq!(
        log(&place, "whole/metrics.jsonl"),
        log(&place, "broken/metrics.jsonl")
    );
    for file in ["model", "ema", "optimizer"] {
        let name = format!("checkpoints/step-000150/{file}.safetensors");
        assert_eq!(
            place.bytes(&format!("whole/{name}")),
            place.bytes(&format!("broken/{name}")),
            "{file}"
        );
    }
    assert_eq!(partials(&place.path("broken")).len(), 0);
}

#[test]
fn distill_survives_kill_9() {
    let place = Place::with_teacher();
    place.ok("score teacher/model pick --criterion oracle");
    place.ok("cut teacher/model cut --selection pick/selection.json");
    let flags = "--steps 150 --batch-size 8 --checkpoint-every 1 --log-every 1 --teacher teacher/model \
                 --selection pick/selection.json --features masked";
    place.ok(&format!("distill cut whole {flags}"));
    for after in [2, 15, 40] {
        let mut child = place.start(&format!("distill cut broken {flags}"));
        wait_for_steps(&place.path("broken"), after);
        child.kill().unwrap();
        assert_eq!(
            child.wait().unwrap().signal(),
            Some(9),
            "it was still running"
        );
    }
    place.ok(&format!("distill cut broken {flags}"));
    assert_eq!(
        place.bytes("whole/model/model.safetensors"),
        place.bytes("broken/model/model.safetensors")
    );
    assert_eq!(
        log(&place, "whole/metrics.jsonl"),
        log(&place, "broken/metrics.jsonl")
    );
}

#[test]
fn ctrl_c_stops_at_the_next_step_with_a_checkpoint() {
    let place = Place::with_teacher();
    // Far too long to finish, and no checkpoint falls due by itself.
    let flags =
        "--pattern 1:2 --steps 100000 --batch-size 8 --checkpoint-every 100000 --log-every 1";
    let mut child = place.start(&format!("learn teacher/model out {flags}"));
    wait_for_steps(&place.path("out"), 3);
    assert!(
        Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    let lines = place.text("out/metrics.jsonl").lines().count();
    let checkpoints: Vec<String> = std::fs::read_dir(place.path("out/checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(
        checkpoints,
        [format!("step-{lines:06}")],
        "one checkpoint, at the last step logged"
    );
    assert!(
        !place.path("out/selection.json").exists(),
        "no decision is written for an unfinished run"
    );
}

#[test]
fn a_run_goes_on_in_the_numbers_it_began_with() {
    let place = Place::with_teacher();
    let line = "learn teacher/model run --steps 2 --batch-size 4 --device cpu";
    place.ok(line);
    let settings = place.text("run/config.toml");
    let compute = "[compute]\ndevice = \"cpu\"\ndtype = \"f32\"\n";
    assert!(settings.contains(compute), "{settings}");
    let write = |compute_then: &str| {
        let changed = settings.replace(compute, compute_then);
        std::fs::write(place.path("run/config.toml"), changed).unwrap();
    };
    // A folder without the entry is of f32, and the device may be another.
    write("");
    place.ok(line);
    write("[compute]\ndevice = \"cuda\"\ndtype = \"f32\"\n");
    let said = String::from_utf8(place.run(line).stderr).unwrap();
    assert!(said.contains("began on \"cuda\""), "{said}");
    write("[compute]\ndevice = \"cuda\"\ndtype = \"bf16\"\n");
    let said = place.fails(2, line);
    assert!(
        said.contains("was \"bf16\", is now \"f32\"; go on with --dtype bf16"),
        "{said}"
    );
}
