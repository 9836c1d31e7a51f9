//! `tinyfusion report` on small hand-written results.json files.
#![allow(clippy::unwrap_used)] // a test may panic

use serde_json::{Value, json};
use tinyfusion_tests::{Place, partials};

fn row(criterion: &str, seed: u64, fid: f64) -> Value {
    json!({
        "id": format!("{criterion}-ft"), "name": format!("{criterion}, fine-tuned"), "criterion": criterion,
        "pattern": null, "recovery": "fine-tuning", "seed": seed, "sampling_steps": 10,
        "kept_layers": [0, 2], "depth": 2, "parameters": 1000,
        "calibration_loss": fid / 100.0, "held_out_loss": 0.5, "held_out_standard_error": 0.1,
        "fid": fid, "sfid": null, "inception_score": 2.0, "precision": 0.5, "recall": 0.5, "kid": null,
        "accuracy": 0.25, "images_per_second": 4.0, "failed": null,
        "stages": {"loss": {"seconds": 1.0, "peak_rss_bytes": null}},
    })
}

/// As files were before studies: no `family`, no `teacher`, no group.
fn results(preset: &str, seed: u64, fids: [f64; 2]) -> Value {
    let [learned, oracle] = fids;
    json!({
        "preset": preset, "settings": {"seed": seed, "recover": {"flags": {"steps": 5}}},
        "machine": {"cpu": null, "cores": 2, "memory_bytes": null, "os": "x", "rustc": null, "git_commit": null,
            "git_dirty": null, "binary_sha256": "00"},
        "features": "small classifier", "reference_count": 300, "sample_count": 200, "seconds": 2.0,
        "peak_rss_bytes": null, "warnings": [], "commands": [], "random": null,
        "rows": [row("learned", seed, learned), row("oracle", seed, oracle)],
    })
}

fn write(place: &Place, run: &str, results: &Value) {
    std::fs::create_dir_all(place.path(run)).unwrap();
    let text = serde_json::to_string(results).unwrap();
    std::fs::write(place.path(run).join("results.json"), text).unwrap();
}

/// Three seeds of the preset `small`: learned is better by 2, 3 and 4.
fn three_seeds(place: &Place) {
    for (seed, fids) in [[8.0, 10.0], [9.0, 12.0], [10.0, 14.0]]
        .into_iter()
        .enumerate()
    {
        write(
            place,
            &format!("s{seed}"),
            &results("small", seed as u64, fids),
        );
    }
}

#[test]
fn seeds_are_taken_together_and_presets_stand_side_by_side() {
    let place = Place::new();
    three_seeds(&place);
    write(&place, "other", &results("other", 0, [3.0, 2.0]));
    let said = place.ok("report s0 s1/results.json s2 other --out out");
    let written = ["report.html", "report.md", "results.csv", "rows.tex"];
    assert_eq!(said.lines().count(), written.len());
    for name in written {
        assert!(said.contains(&format!("out/{name}")), "{said}");
    }
    let text = place.text("out/report.md");
    // Means and deviations with n − 1: 8, 9, 10 and 10, 12, 14.
    assert!(
        text.contains("| **9.0 ± 1.0** |") && text.contains("| 12.0 ± 2.0 |"),
        "{text}"
    );
    // Differences −2, −3, −4: t = −3√3 with 2 degrees of freedom: p 0.035; 3 ± 4.303 / √3.
    let expected =
        "| learned, fine-tuned | oracle, fine-tuned | FID | −3 | −5.484 to −0.5159 | 0.035 | Yes |";
    assert!(text.contains(expected), "{text}");
    let sections: Vec<&str> = text.lines().filter(|l| l.starts_with("## ")).collect();
    assert_eq!(sections, ["## small, DiT", "## other, DiT"]);
    // One seed is not tested, and the better rival is the bold one.
    assert!(text.contains("which differences are noise cannot be tested"));
    assert!(text.contains("| **2** |"));
    let tex = place.text("out/rows.tex");
    assert!(tex.contains("\\textbf{9.0 $\\pm$ 1.0}"), "{tex}");
    assert!(
        tex.lines()
            .filter(|l| l.contains('&') && !l.starts_with('%'))
            .all(|l| l.ends_with("\\\\"))
    );
    let csv = place.text("out/results.csv");
    assert_eq!(csv.lines().count(), 9, "a head, and every row by itself");
    assert!(
        csv.contains(
            "small,DiT,learned-ft,learned-ft,\"learned, fine-tuned\",learned,,fine-tuning,2,2,"
        ),
        "{csv}"
    );
    let html = place.text("out/report.html");
    assert!(html.contains("<strong>9.0 ± 1.0</strong>") && html.contains("<svg "));
    assert!(!html.contains("src=\"http") && !html.contains("<script"));
    assert_eq!(
        partials(&place.path("out")),
        Vec::<std::path::PathBuf>::new()
    );
}

#[test]
fn only_the_wanted_formats_are_written() {
    let place = Place::new();
    three_seeds(&place);
    place.ok("report s0 --out out --format csv,md");
    let there = |name: &str| place.path("out").join(name).exists();
    assert!(
        there("results.csv") && there("report.md") && !there("report.html") && !there("rows.tex")
    );
    place.fails(2, "report s0 --out out2 --format pdf");
    place.fails(2, "report");
    assert!(!place.path("out2").exists());
}

#[test]
fn what_cannot_be_compared_is_refused_unless_forced() {
    let place = Place::new();
    three_seeds(&place);
    let mut other = results("other", 0, [3.0, 2.0]);
    other["features"] = "Inception".into();
    other["sample_count"] = 50_000.into();
    write(&place, "inception", &other);
    let error = place.fails(2, "report s0 inception --out out");
    for part in [
        "features of the evaluation differ",
        "Inception in inception/results.json",
        "samples per row differ: 200",
        "--force",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!place.path("out").exists(), "nothing is written");
    place.ok("report s0 inception --out out --force");
    assert!(
        place
            .text("out/report.md")
            .contains("by force; these cannot be compared")
    );
    // The same run twice would count twice; other settings are no other seed.
    let error = place.fails(2, "report s0 s0 --out twice");
    assert!(error.contains("`learned-ft` of seed 0"), "{error}");
    let mut longer = results("small", 7, [3.0, 2.0]);
    longer["settings"]["recover"]["flags"]["steps"] = 50.into();
    write(&place, "longer", &longer);
    let error = place.fails(2, "report s0 longer --out twice");
    assert!(error.contains("recover/flags/steps = 5 and 50"), "{error}");
    assert!(!place.path("twice").exists());
}

#[test]
fn files_that_are_no_results_are_named() {
    let place = Place::new();
    std::fs::create_dir(place.path("empty")).unwrap();
    let error = place.fails(2, "report empty");
    assert!(
        error.contains("empty/results.json") && error.contains("cargo xtask reproduce"),
        "{error}"
    );
    std::fs::write(place.path("x.json"), "{\"preset\": \"x\"}").unwrap();
    let error = place.fails(2, "report x.json");
    assert!(
        error.contains("x.json") && error.contains("missing field `settings`"),
        "{error}"
    );
    let mut unknown = results("small", 0, [1.0, 2.0]);
    unknown["study"] = json!({"kind": "table99"});
    write(&place, "unknown", &unknown);
    let error = place.fails(2, "report unknown");
    assert!(
        error.contains("table99") && error.contains("table3"),
        "{error}"
    );
}

#[test]
fn a_studys_plots_are_drawn_from_the_runs_own_files() {
    let place = Place::new();
    let mut run = results("figure", 0, [1.0, 2.0]);
    run["study"] =
        json!({"kind": "activations", "title": "hidden states", "columns": ["criterion", "where"]});
    run["rows"][0]["labels"] = json!({"where": "here"});
    run["rows"][0]["traces"] = json!({"activations": "rows/a.json"});
    write(&place, "run", &run);
    let error = place.fails(1, "report run --out out");
    assert!(error.contains("run/rows/a.json"), "{error}");
    assert!(!place.path("out").exists());
    std::fs::create_dir(place.path("run/rows")).unwrap();
    let layer = json!({"layer": 0, "edges": [-1, 0, 1], "counts": [5, 7], "mean": 0, "std": 1, "max_abs": 1});
    std::fs::write(
        place.path("run/rows/a.json"),
        json!({"layers": [layer]}).to_string(),
    )
    .unwrap();
    place.ok("report run --out out");
    let text = place.text("out/report.md");
    assert!(
        text.contains("## figure: hidden states") && text.contains("| criterion | where |"),
        "{text}"
    );
    assert!(
        text.contains("| learned | here |") && text.contains("| oracle | – |"),
        "{text}"
    );
    assert_eq!(
        place
            .text("out/report.html")
            .matches("class=\"f3 bin\"")
            .count(),
        2
    );
}
