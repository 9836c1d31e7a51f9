use std::collections::BTreeSet;

use super::*;
use crate::reproduce::preset::tests::embedded;

#[test]
fn the_embedded_presets_plan_every_required_row() {
    for name in ["tiny", "smoke-dit"] {
        let plan = plan(&embedded(name), Path::new("runs/x")).unwrap();
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
        let plan = plan(&part, Path::new("runs/x")).unwrap();
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
        assert_eq!(has("oracle-kd"), part.recover.oracle_kd);
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

#[test]
fn every_input_is_made_before_it_is_read() {
    let preset = embedded("tiny");
    let plan = plan(&preset, Path::new("runs/x")).unwrap();
    let mut made: Vec<PathBuf> = Vec::new();
    for stage in &plan.stages {
        for input in stage
            .inputs
            .iter()
            .filter(|i| **i != preset.teacher && **i != preset.classifier)
        {
            let there = made.iter().any(|m| m == input || m.starts_with(input));
            assert!(
                there,
                "{} reads {} before it is made",
                stage.name,
                input.display()
            );
        }
        made.extend(stage.outputs.iter().cloned());
    }
    for row in &plan.rows {
        let files = [
            &row.files.inspect,
            &row.files.loss,
            &row.files.sample,
            &row.files.scores,
            &row.files.grid,
        ];
        for file in files
            .into_iter()
            .chain(&row.files.selection)
            .chain(&row.files.metrics)
        {
            assert!(
                made.contains(file),
                "{}: nothing makes {}",
                row.id,
                file.display()
            );
        }
    }
}

#[test]
fn names_and_folders_are_not_shared() {
    let plan = plan(&embedded("tiny"), Path::new("runs/x")).unwrap();
    let names: BTreeSet<&str> = plan.stages.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names.len(), plan.stages.len());
    let folders: Vec<&PathBuf> = plan
        .stages
        .iter()
        .filter_map(|s| s.folder.as_ref())
        .collect();
    for (i, a) in folders.iter().enumerate() {
        for b in &folders[i + 1..] {
            assert!(
                !a.starts_with(b) && !b.starts_with(a),
                "{} and {}",
                a.display(),
                b.display()
            );
        }
    }
}

#[test]
fn distillation_gets_teacher_and_selection_and_fine_tuning_gets_neither() {
    let plan = plan(&embedded("tiny"), Path::new("runs/x")).unwrap();
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
