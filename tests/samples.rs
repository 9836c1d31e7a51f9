//! What stands in a folder of samples: whole, of one run, and never written over by another.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tinyfusion_tests::{Place, partials};

fn changed(place: &Place, name: &str) -> std::time::SystemTime {
    fs::metadata(place.path(name)).unwrap().modified().unwrap()
}

#[test]
fn a_folder_of_samples_has_one_writer() {
    let place = Place::with_teacher();
    let line = "sample teacher/model out --count 400 --steps 500 --batch-size 1";
    let mut first = place.start(line);
    let begun = Instant::now();
    while !place.path("out/parts").exists() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "nothing is drawn"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let error = place.fails(2, line);
    assert!(error.contains("another process"), "{error}");
    assert!(first.try_wait().unwrap().is_none(), "it was still drawing");
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn an_interruption_says_what_is_kept() {
    let place = Place::with_teacher();
    let line = "sample teacher/model out --count 400 --steps 500 --batch-size 1";
    let mut child = place.command(line).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while !place.path("out/parts").exists() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "nothing is drawn"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let id = child.id().to_string();
    let asked = Command::new("kill").args(["-INT", &id]).status().unwrap();
    assert!(asked.success());
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said}");
    assert!(
        said.contains("interrupted; what has come so far is kept, and the same command goes on"),
        "{said}"
    );
}

#[test]
fn samples_of_other_settings_are_not_written_over() {
    let place = Place::with_teacher();
    let line = "sample teacher/model out --count 6 --steps 2 --seed 1";
    place.ok(line);
    let (npz, record) = (
        place.bytes("out/samples.npz"),
        place.bytes("out/sample.json"),
    );
    for (other, says) in [
        (line.replace("--seed 1", "--seed 2"), "seed 1, asked for: 2"),
        (
            line.replace("--count 6", "--count 7"),
            "count 6, asked for: 7",
        ),
    ] {
        let error = place.fails(2, &other);
        assert!(
            error.contains(says) && error.contains("name another folder"),
            "{error}"
        );
    }
    assert!(npz == place.bytes("out/samples.npz") && record == place.bytes("out/sample.json"));
    // Nor are those of which nothing is known.
    fs::create_dir(place.path("theirs")).unwrap();
    fs::write(place.path("theirs/samples.npz"), &npz).unwrap();
    let error = place.fails(2, &line.replace(" out ", " theirs "));
    assert!(error.contains("without a sample.json"), "{error}");
    assert!(partials(&place.path("")).is_empty());
}

#[test]
fn damaged_samples_are_drawn_again() {
    let place = Place::with_teacher();
    let line = "sample teacher/model out --count 6 --steps 2";
    place.ok(line);
    let whole = place.bytes("out/samples.npz");
    fs::write(place.path("out/samples.npz"), &whole[..whole.len() - 3]).unwrap();
    let said = place.run(line);
    let said = String::from_utf8_lossy(&said.stderr);
    assert!(
        said.contains("damaged") && said.contains("drawn again"),
        "{said}"
    );
    assert!(place.bytes("out/samples.npz") == whole);
    fs::remove_file(place.path("out/samples.npz")).unwrap();
    place.ok(line);
    assert!(place.bytes("out/samples.npz") == whole);
}

#[test]
fn pictures_are_made_of_samples_that_are_there() {
    let place = Place::with_teacher();
    let line = "sample teacher/model OUT --count 70 --steps 2 --share 1/2";
    place.ok(&line.replace("OUT", "whole --pngs --grid-columns 5"));
    place.ok(&line.replace("OUT", "out"));
    let before = changed(&place, "out/samples.npz");
    let said = place.ok(&line.replace("OUT", "out --pngs --grid-columns 5"));
    assert!(said.contains("drawn already"), "{said}");
    assert_eq!(before, changed(&place, "out/samples.npz"));
    for i in 35..70 {
        let name = format!("images/{i:08}.png");
        assert!(place.bytes(&format!("out/{name}")) == place.bytes(&format!("whole/{name}")));
    }
    assert!(place.bytes("out/grid.png") == place.bytes("whole/grid.png"));
    let of = |name: &str| {
        let mut record = place.json(name);
        for of_the_run in ["seconds", "images_per_second"] {
            record.as_object_mut().unwrap().remove(of_the_run);
        }
        record
    };
    assert_eq!(of("out/sample.json"), of("whole/sample.json"));
    // Asked for less, there is nothing to do.
    let said = place.ok(&line.replace("OUT", "out --grid-columns 5"));
    assert!(said.contains("all is there already"), "{said}");
}
