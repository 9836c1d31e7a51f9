use std::collections::BTreeSet;

use super::*;
use crate::reproduce::preset::tests::embedded;

#[test]
fn the_embedded_presets_plan_every_required_row() {
    for name in ["tiny", "smoke-dit"] {
        let plan = plan(
            &embedded(name),
            Path::new("runs/x"),
            Path::new("hub.lock"),
            1,
        )
        .unwrap();
        let ids: Vec<&str> = plan.rows.iter().map(|r| r.id.as_str()).collect();
        let required = [
            "dense",
            "random-1-2-seed-0-ft",
            "random-1-2-seed-1-ft",
            "random-1-2-seed-2-ft",
            "random-1-2-seed-3-ft",
            "oracle-ft",
            "oracle-kd",
            "learned-1-2-ft",
            "learned-1-2-kd",
            "learned-2-4-ft",
            "learned-2-4-kd",
        ];
        for id in required {
            assert!(ids.contains(&id), "{name} lacks {id}: {ids:?}");
        }
        let fewer = |r: &Row| r.criterion == "dense" && r.id != "dense";
        assert!(
            plan.rows.iter().any(fewer),
            "{name} lacks the control with fewer steps"
        );
    }
}

#[test]
fn the_parts_of_table_2_plan_what_it_compares() {
    for part in crate::reproduce::recipe::tests::embedded("table2").parts {
        let plan = plan(&part, Path::new("runs/x"), Path::new("hub.lock"), 1).unwrap();
        let has = |id: &str| plan.rows.iter().any(|r| r.id == id);
        for id in [
            "dense",
            "random-2-4-seed-0-ft",
            "random-2-4-seed-1-ft",
            "random-2-4-seed-2-ft",
            "oracle-ft",
            "learned-2-4-ft",
            "learned-2-4-kd",
        ] {
            assert!(has(id), "{} lacks {id}", part.name);
        }
        assert!(!has("oracle-kd"), "{}", part.name);
        // Half the network's passes: a MAR's are its iterations, and its tokens keep their steps.
        let fewer = part.sample.fewer_steps[0];
        let name = format!("dense-{fewer}-steps/sampling");
        let control = plan.stages.iter().find(|s| s.name == name).unwrap();
        let (line, mar) = (control.args.join(" "), part.name.ends_with("mar"));
        let counted = if mar { "--iterations" } else { "--steps" };
        assert!(line.contains(&format!(" {counted} {fewer} ")), "{line}");
        assert_eq!(line.contains("--respacing ddim25"), mar, "{line}");
        let seconds: f64 = plan.stages.iter().map(|s| s.seconds).sum();
        assert!(seconds <= 400.0, "{}: {seconds} s are expected", part.name);
    }
}

/// The commands of the tables that are published: another way to write a preset leaves them as they are.
#[test]
fn published_tables_keep_their_commands() {
    for (name, commands) in [
        ("tiny", include_str!("commands/tiny.txt")),
        ("table2-dit", include_str!("commands/table2-dit.txt")),
        ("table2-sit", include_str!("commands/table2-sit.txt")),
        ("table2-mar", include_str!("commands/table2-mar.txt")),
    ] {
        let plan = plan(&embedded(name), Path::new("OUT"), Path::new("hub.lock"), 1).unwrap();
        let line = |stage: &Stage| {
            let to = stage.capture.as_deref().map(|f| format!(" > {}", say(f)));
            stage.args.join(" ") + &to.unwrap_or_default()
        };
        let planned: Vec<String> = plan.stages.iter().map(line).collect();
        let published: Vec<&str> = commands.lines().collect();
        assert_eq!(planned, published, "{name}");
    }
}

const STUDIES: &[&str] = &[
    "table1",
    "table3",
    "table4",
    "table5",
    "table7",
    "figure4",
    "figure6",
    "activations",
    "kd-batch",
];

/// Every preset, once and repeated.
fn plans() -> impl Iterator<Item = (String, Preset, Plan)> {
    let names = STUDIES.iter().chain(&["tiny", "smoke-dit", "smoke-mar"]);
    names.flat_map(|name| {
        let of = move |seeds| {
            let preset = embedded(name);
            let plan = plan(&preset, Path::new("runs/x"), Path::new("hub.lock"), seeds).unwrap();
            (format!("{name} with {seeds} seeds"), preset, plan)
        };
        [of(1), of(3)]
    })
}

#[test]
fn every_input_is_made_before_it_is_read() {
    for (name, preset, plan) in plans() {
        let mut made: Vec<PathBuf> = Vec::new();
        let models: Vec<&PathBuf> = std::iter::once(&preset.teacher)
            .chain(&preset.classifier)
            .collect();
        for stage in &plan.stages {
            for input in stage.inputs.iter().filter(|i| !models.contains(i)) {
                assert!(
                    made.iter().any(|m| m == input || m.starts_with(input)),
                    "{name}: {} reads {} before it is made",
                    stage.name,
                    input.display()
                );
            }
            made.extend(stage.outputs.iter().cloned());
        }
        for row in &plan.rows {
            let f = &row.files;
            let files = [&f.inspect, &f.loss, &f.sample, &f.scores, &f.grid].into_iter();
            let some = [&f.selection, &f.metrics, &f.history, &f.activations].into_iter();
            for file in files.chain(some.flatten()).chain(&row.ancestors) {
                assert!(
                    made.contains(file),
                    "{name}: nothing makes {} of {}",
                    file.display(),
                    row.id
                );
            }
        }
    }
}

#[test]
fn names_and_folders_are_not_shared() {
    for (name, _, plan) in plans() {
        let distinct = |all: Vec<&str>| all.iter().collect::<BTreeSet<_>>().len() == all.len();
        assert!(distinct(plan.rows.iter().map(|r| r.id.as_str()).collect()));
        assert!(
            distinct(plan.rows.iter().map(|r| r.name.as_str()).collect()),
            "{name}"
        );
        let folders: Vec<&PathBuf> = plan
            .stages
            .iter()
            .filter_map(|s| s.folder.as_ref())
            .collect();
        for (i, a) in folders.iter().enumerate() {
            for b in &folders[i + 1..] {
                assert!(
                    !a.starts_with(b) && !b.starts_with(a),
                    "{name}: {} and {}",
                    a.display(),
                    b.display()
                );
            }
        }
    }
}

#[test]
fn distillation_gets_teacher_and_selection_and_fine_tuning_gets_neither() {
    let plan = plan(
        &embedded("tiny"),
        Path::new("runs/x"),
        Path::new("hub.lock"),
        1,
    )
    .unwrap();
    let args = |name: &str| {
        plan.stages
            .iter()
            .find(|s| s.name == name)
            .unwrap()
            .args
            .join(" ")
    };
    let kd = args("learned-2-4-kd/recovery");
    assert!(kd.contains(
        "--teacher assets/teacher --selection runs/x/masks/learned-2-4/search/selection.json"
    ));
    assert!(kd.contains("--features masked"), "{kd}");
    let ft = args("learned-2-4-ft/recovery");
    assert!(!ft.contains("--teacher") && !ft.contains("--selection") && !ft.contains("--features"));
    // The same budget.
    let budget = |s: &str| {
        s.split("--steps ")
            .nth(1)
            .unwrap()
            .split(' ')
            .next()
            .unwrap()
            .to_string()
    };
    assert_eq!(budget(&kd), budget(&ft));
}

fn args(plan: &Plan, name: &str) -> String {
    let stage = plan.stages.iter().find(|s| s.name == name);
    stage
        .unwrap_or_else(|| panic!("no stage {name}"))
        .args
        .join(" ")
}

#[test]
fn a_repeat_adds_what_a_seed_changes_and_nothing_else() {
    let names = |seeds| -> Vec<String> {
        let plan = plan(
            &embedded("tiny"),
            Path::new("runs/x"),
            Path::new("hub.lock"),
            seeds,
        )
        .unwrap();
        plan.stages.into_iter().map(|s| s.name).collect()
    };
    let (once, thrice) = (names(1), names(3));
    // The first seed's stages come first and are the same: a run can be extended.
    assert_eq!(thrice[..once.len()], once);
    let plan = plan(
        &embedded("tiny"),
        Path::new("runs/x"),
        Path::new("hub.lock"),
        3,
    )
    .unwrap();
    let groups = |of: u64| -> Vec<&str> {
        let rows = plan.rows.iter().filter(|r| r.repeat == of);
        rows.filter(|r| r.criterion != "dense")
            .map(|r| r.group.as_str())
            .collect()
    };
    assert_eq!(groups(0), groups(1));
    assert_eq!(groups(0), groups(2));
    assert_eq!(
        groups(0).iter().filter(|g| **g == "random-1-2-ft").count(),
        4
    );
    // The oracle has no seed: one mask for all, recovered under each.
    assert_eq!(thrice.iter().filter(|n| *n == "oracle/search").count(), 1);
    let third = args(&plan, "oracle-seed-2-kd/recovery");
    assert!(third.starts_with("distill runs/x/masks/oracle/cut ") && third.ends_with(" --seed 2"));
    let learned = args(&plan, "learned-2-4-seed-2/search");
    assert!(learned.ends_with(" --seed 2"), "{learned}");
    // No two random masks have the same seed.
    let random: BTreeSet<u64> = plan
        .rows
        .iter()
        .filter(|r| r.criterion == "random")
        .map(|r| r.seed)
        .collect();
    assert_eq!(random, (0..12).collect());
    assert!(
        plan.rows
            .iter()
            .filter(|r| r.criterion == "dense")
            .all(|r| r.repeat == 0)
    );
}

#[test]
fn a_study_names_its_kind_and_its_time() {
    // Minutes of one seed on two cores.
    let at_most = [60.0, 22.0, 15.0, 15.0, 12.0, 12.0, 12.0, 12.0];
    for (name, minutes) in STUDIES.iter().zip(at_most) {
        let preset = embedded(name);
        let kind = serde_json::to_value(preset.study.as_ref().unwrap().kind).unwrap();
        assert_eq!(kind, *name);
        let plan = plan(&preset, Path::new("runs/x"), Path::new("hub.lock"), 1).unwrap();
        let expected = plan.stages.iter().map(|s| s.seconds).sum::<f64>() / 60.0;
        assert!(
            expected < minutes,
            "{name}: {expected} minutes are expected"
        );
        assert!(expected > 2.0, "{name}: {expected} minutes are expected");
    }
}

#[test]
fn table_1_is_a_product_of_criteria_depths_recoveries_and_budgets() {
    let plan = plan(
        &embedded("table1"),
        Path::new("runs/x"),
        Path::new("hub.lock"),
        1,
    )
    .unwrap();
    let has = |id: &str| assert!(plan.rows.iter().any(|r| r.id == id), "{id} is missing");
    for criterion in [
        "magnitude",
        "block-influence",
        "flux-lite",
        "sensitivity",
        "sensitivity-greedy",
    ] {
        for keep in [8, 11] {
            for tail in [
                "ft-200-steps",
                "ft-600-steps",
                "kd-200-steps",
                "kd-600-steps",
            ] {
                has(&format!("{criterion}-{keep}-{tail}"));
            }
        }
    }
    for id in [
        "learned-2-4-kd-600-steps",
        "learned-3-4_3-4_2-4_3-4-ft-200-steps",
        "oracle-kd-200-steps",
        "width-half-kd-600-steps",
        "random-any-11-seed-0-ft-600-steps",
        "random-search-8-kd-200-steps",
    ] {
        has(id);
    }
    let row = plan
        .rows
        .iter()
        .find(|r| r.id == "learned-2-4-kd-200-steps")
        .unwrap();
    assert_eq!(
        (row.budget_steps, row.samples_seen),
        (Some(200), Some(3200))
    );
    assert_eq!(row.group, row.id);
    assert_eq!(row.name, "learned 2:4 (lora), masked KD, 200 steps");
    let budget = args(&plan, "learned-2-4-kd-200-steps/recovery");
    assert!(
        budget.contains(" --lr 0.002 --steps 200 --teacher assets/teacher --selection "),
        "{budget}"
    );
    let score = args(&plan, "flux-lite-11/search");
    assert!(
        score.ends_with("/search --criterion flux-lite --keep 11 --samples 256 --seed 0"),
        "{score}"
    );
    // What looks at weights alone has neither images nor seeds.
    let score = args(&plan, "magnitude-8/search");
    assert!(
        score.ends_with("/search --criterion magnitude --keep 8"),
        "{score}"
    );
    let narrow = args(&plan, "width-half/narrow");
    assert_eq!(
        narrow,
        "narrow assets/teacher runs/x/masks/width-half/cut --parameters-of runs/x/masks/oracle/cut --batch-size 16 --samples 16 --seed 0"
    );
}

#[test]
fn the_second_jump_of_table_7_begins_at_the_recovered_model() {
    let plan = plan(
        &embedded("table7"),
        Path::new("runs/x"),
        Path::new("hub.lock"),
        2,
    )
    .unwrap();
    let d8 = "runs/x/rows/d8-seed-1-kd/recovered/model";
    let search = args(&plan, "halves-seed-1/search");
    assert!(
        search.starts_with(&format!(
            "learn {d8} runs/x/masks/halves-seed-1/search --pattern 1:2 "
        )),
        "{search}"
    );
    let cut = args(&plan, "halves-seed-1/cut");
    assert!(cut.starts_with(&format!("cut {d8} ")), "{cut}");
    for id in ["jump-seed-1-by-d8", "halves-seed-1-by-d8"] {
        let taught = args(&plan, &format!("{id}/recovery"));
        assert!(
            taught.contains(&format!(
                " --teacher {d8} --align 1:2 --alpha-kd 0.9 --beta 0.01 --features masked "
            )),
            "{taught}"
        );
    }
    let row = plan
        .rows
        .iter()
        .find(|r| r.id == "halves-seed-1-by-dense")
        .unwrap();
    assert_eq!(
        row.ancestors,
        [Path::new("runs/x/masks/d8-seed-1/search/selection.json")]
    );
    assert_eq!(row.recovery, Recovery::MaskedKd);
}

#[test]
fn fixed_blocks_have_their_selection_beside_the_cut_model() {
    let plan = plan(
        &embedded("figure4"),
        Path::new("runs/x"),
        Path::new("hub.lock"),
        1,
    )
    .unwrap();
    let cut = args(&plan, "depth-4/cut");
    assert_eq!(
        cut,
        "cut assets/teacher runs/x/masks/depth-4/cut --keep 0,5,10,15"
    );
    let row = plan.rows.iter().find(|r| r.id == "depth-4-ft").unwrap();
    let selection = row.files.selection.as_deref();
    assert_eq!(
        selection,
        Some(Path::new("runs/x/masks/depth-4/cut/selection.json"))
    );
}

#[test]
fn what_does_not_fit_together_is_named() {
    let refused = |change: &dyn Fn(&mut Preset)| {
        let mut preset = embedded("table7");
        change(&mut preset);
        format!(
            "{:#}",
            plan(&preset, Path::new("runs/x"), Path::new("hub.lock"), 1).unwrap_err()
        )
    };
    let said = refused(&|p| p.masks[2].of = Some("d9-kd".into()));
    assert!(
        said.contains("masks `halves`: no row `d9-kd` stands before; there are dense, d8-kd"),
        "{said}"
    );
    // Features of a teacher that the student was not cut from have no counterpart.
    let said = refused(&|p| {
        let taught = p.recoveries.iter_mut().find(|r| r.id == "by-d8");
        taught.unwrap().flags.remove("align");
    });
    assert!(
        said.contains("recovery `by-d8`") && said.contains("or features = \"none\""),
        "{said}"
    );
    let said = refused(&|p| p.masks[1].id = Some("d8".into()));
    assert!(said.contains("are called `d8`"), "{said}");
}
