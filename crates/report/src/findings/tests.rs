use super::*;
use crate::sample::results;

fn answers(results: &Results, part: &str) -> Vec<(Verdict, String)> {
    findings(results)
        .into_iter()
        .find(|f| f.question.contains(part))
        .unwrap()
        .answers
}

fn set(results: &mut Results, id: &str, fid: f64) {
    results.rows.iter_mut().find(|r| r.id == id).unwrap().fid = Some(fid);
    results.random = crate::aggregate::Aggregate::of(&results.rows);
}

// The made-up random masks have FID 20, 24, 28, 32: median 26, spread 12.

#[test]
fn a_win_is_better_than_every_random_mask() {
    let mut r = results();
    set(&mut r, "learned-1-2-ft", 15.0);
    assert_eq!(answers(&r, "median random")[0].0, Verdict::Yes);
    let every = &answers(&r, "every random")[0];
    assert_eq!(every.0, Verdict::Yes);
    assert!(every.1.contains("beats 4 of 4"), "{}", every.1);
}

#[test]
fn inside_the_spread_is_not_called_a_win() {
    let mut r = results();
    set(&mut r, "learned-1-2-ft", 22.0);
    let median = &answers(&r, "median random")[0];
    assert_eq!(median.0, Verdict::Unclear);
    assert!(median.1.contains("inside the spread"), "{}", median.1);
    let every = &answers(&r, "every random")[0];
    assert_eq!(every.0, Verdict::No);
    assert!(every.1.contains("beats 3 of 4"), "{}", every.1);
}

#[test]
fn a_loss_is_said_plainly() {
    let mut r = results();
    set(&mut r, "learned-1-2-ft", 30.0);
    let median = &answers(&r, "median random")[0];
    assert_eq!(median.0, Verdict::No);
    assert!(
        median.1.starts_with("the learned mask does not win: "),
        "{}",
        median.1
    );
    set(&mut r, "learned-1-2-ft", 26.1);
    let median = &answers(&r, "median random")[0];
    assert_eq!(median.0, Verdict::Unclear);
    assert!(median.1.starts_with("a tie"), "{}", median.1);
}

#[test]
fn pairs_are_judged_against_the_spread() {
    let mut r = results();
    set(&mut r, "learned-1-2-ft", 18.0);
    for (oracle, verdict) in [
        (40.0, Verdict::Yes),
        (25.0, Verdict::Unclear),
        (18.1, Verdict::Unclear),
        (5.0, Verdict::No),
    ] {
        set(&mut r, "oracle-ft", oracle);
        let answer = &answers(&r, "oracle")[0];
        assert_eq!(answer.0, verdict, "{}", answer.1);
    }
    set(&mut r, "learned-1-2-kd", 3.0);
    let kd = answers(&r, "distillation")
        .into_iter()
        .find(|(_, t)| t.contains("learned 1:2"))
        .unwrap();
    assert_eq!(kd.0, Verdict::Yes, "{}", kd.1);
    set(&mut r, "learned-1-2-kd", 38.0);
    let kd = answers(&r, "distillation")
        .into_iter()
        .find(|(_, t)| t.contains("learned 1:2"))
        .unwrap();
    assert_eq!(kd.0, Verdict::No, "{}", kd.1);
}

#[test]
fn a_speed_up_has_to_beat_fewer_steps_at_its_own_speed() {
    let mut r = results();
    let kd = |r: &Results| {
        answers(r, "fewer steps")
            .into_iter()
            .find(|(_, t)| t.contains("learned 1:2 (lora), masked KD"))
            .unwrap()
    };
    set(&mut r, "learned-1-2-kd", 20.0);
    set(&mut r, "dense-12-steps", 5.0);
    assert_eq!(kd(&r).0, Verdict::No, "{}", kd(&r).1);
    set(&mut r, "dense-12-steps", 50.0);
    assert_eq!(kd(&r).0, Verdict::Yes, "{}", kd(&r).1);
    // A slower control does not count, however good.
    r.rows
        .iter_mut()
        .find(|row| row.id == "dense-12-steps")
        .unwrap()
        .images_per_second = Some(1.0);
    assert_eq!(kd(&r).0, Verdict::Unknown, "{}", kd(&r).1);
    assert!(kd(&r).1.contains("no control is as fast"));
}

#[test]
fn depth_needs_both_numbers() {
    let mut r = results();
    set(&mut r, "dense", 2.0);
    assert_eq!(answers(&r, "depth")[0].0, Verdict::Yes);
    r.rows
        .iter_mut()
        .find(|row| row.id == "dense")
        .unwrap()
        .held_out_loss = Some(9.0);
    assert_eq!(answers(&r, "depth")[0].0, Verdict::Unclear);
    assert!(headline(&r).ends_with("comes close to the dense teacher."));
}

#[test]
fn the_spread_of_masks_says_nothing_about_the_dense_teacher() {
    let mut r = results();
    // The random masks are far apart; the teacher is far better than any student all the same.
    set(&mut r, "random-1-2-seed-0-ft", 500.0);
    set(&mut r, "dense", 2.0);
    assert_eq!(answers(&r, "depth")[0].0, Verdict::Yes);
}

#[test]
fn the_dense_teacher_meets_the_best_student_of_either_recovery() {
    let mut r = results();
    set(&mut r, "dense", 2.0);
    set(&mut r, "learned-1-2-kd", 15.0);
    set(&mut r, "learned-2-4-kd", 16.0);
    let both = answers(&r, "depth");
    assert!(both[0].1.contains("learned 2:4 (lora), fine-tuned"));
    assert!(both[1].1.contains("learned 1:2 (lora), masked KD"));
    assert_eq!([both[0].0, both[1].0], [Verdict::Yes; 2], "{both:?}");
    assert!(headline(&r).contains("Depth matters: "));
    set(&mut r, "dense", 40.0);
    assert!(headline(&r).contains("Depth does not matter here"));
    // The best of all is fine-tuned: it is named once.
    set(&mut r, "learned-2-4-ft", 1.0);
    assert_eq!(answers(&r, "depth").len(), 1);
}

#[test]
fn a_tie_with_the_best_random_mask_is_no_win() {
    let mut r = results();
    for id in ["learned-1-2-ft", "learned-2-4-ft"] {
        set(&mut r, id, 19.9);
    }
    let median = &answers(&r, "median random")[0];
    assert_eq!(median.0, Verdict::Unclear, "{}", median.1);
    assert!(median.1.contains("a tie with the best"), "{}", median.1);
    assert_eq!(answers(&r, "every random")[0].0, Verdict::No);
    assert!(headline(&r).contains("do not clearly win"));
}

#[test]
fn what_diverged_or_failed_never_wins() {
    let mut r = results();
    let at = r
        .rows
        .iter()
        .position(|row| row.id == "learned-1-2-ft")
        .unwrap();
    r.rows[at].fid = Some(0.5);
    r.rows[at].held_out_loss = None;
    for part in ["median random", "every random", "oracle", "fewer steps"] {
        let answer = answers(&r, part).into_iter().next().unwrap();
        let expected = (
            Verdict::No,
            "learned 1:2 (lora), fine-tuned diverged.".to_string(),
        );
        assert_eq!(answer, expected, "{part}");
    }
    assert!(
        answers(&r, "depth")[0]
            .1
            .contains("learned 2:4 (lora), fine-tuned")
    );
    assert!(
        headline(&r).contains("1 of 2 learned masks"),
        "{}",
        headline(&r)
    );
    assert!(caveats(&r).join("\n").contains("fine-tuned diverged: "));

    r.rows[at].fid = None;
    r.rows[at].failed = Some(crate::results::Failure {
        stage: "learned-1-2-ft/loss".into(),
        error: "error: one\ntwo.\n".into(),
    });
    assert_eq!(answers(&r, "median random")[0].0, Verdict::Unknown);
    let said = caveats(&r).join("\n");
    assert!(
        said.contains("`learned-1-2-ft/loss` failed: error: one; two."),
        "{said}"
    );
}

#[test]
fn the_headline_follows_the_verdicts() {
    let mut r = results();
    for (first, second, part) in [
        (15.0, 16.0, "better than every random mask."),
        (15.0, 22.0, "1 of 2 learned masks"),
        (22.0, 30.0, "do not clearly win"),
        (31.0, 30.0, "do not win"),
    ] {
        set(&mut r, "learned-1-2-ft", first);
        set(&mut r, "learned-2-4-ft", second);
        assert!(headline(&r).contains(part), "{}", headline(&r));
    }
    r.sample_count = Some(40);
    assert!(headline(&r).contains("too small"));
}

#[test]
fn missing_rows_and_numbers_are_no_answers() {
    let mut r = results();
    r.rows.retain(|row| row.criterion == "dense");
    r.random.clear();
    let all = findings(&r);
    assert!(all.iter().all(|f| !f.answers.is_empty()));
    assert_eq!(answers(&r, "median random")[0].0, Verdict::Unknown);
    let mut r = results();
    r.rows.iter_mut().for_each(|row| row.fid = None);
    assert!(
        answers(&r, "oracle")
            .iter()
            .all(|a| a.0 == Verdict::Unknown)
    );
}

#[test]
fn the_report_says_what_its_features_are() {
    let text = caveats(&results()).join("\n");
    assert!(text.contains("small classifier") && text.contains("not on Inception"));
    let mut r = results();
    r.features = "Inception-v3 2015-12-05, pool_3".into();
    r.rows[0].sfid = Some(4.5);
    let text = caveats(&r).join("\n") + &crate::table::legend(&r);
    assert!(!text.contains("small classifier") && text.contains("Inception-v3 2015"));
    assert_eq!(crate::Measure::Sfid.of(&r.rows[0]), Some(4.5));
}

#[test]
fn a_mask_of_another_pattern_is_said_to_have_another_control() {
    let r = results();
    for part in ["median random", "every random"] {
        let both = answers(&r, part);
        assert!(!both[0].1.contains("drawn from"), "{}", both[0].1);
        assert!(
            both[1]
                .1
                .contains("drawn from 1:2, this one from another set, 2:4"),
            "{}",
            both[1].1
        );
    }
    let said = caveats(&r).join("\n");
    assert!(
        said.contains("drawn from 1:2 only. Masks learned with 2:4"),
        "{said}"
    );
    let mut r = results();
    r.rows.retain(|row| row.pattern.as_deref() != Some("2:4"));
    assert!(!caveats(&r).join("\n").contains("only. Masks"));
}

#[test]
fn the_price_of_a_step_with_a_teacher_is_told() {
    let mut r = results();
    let said = caveats(&r).join("\n");
    assert!(
        said.contains("took 1.5 times as long as one of fine-tuning (1.5 to 1.5, 3 pairs of rows)"),
        "{said}"
    );
    r.rows.iter_mut().for_each(|row| row.stages.clear());
    assert!(
        caveats(&r)
            .join("\n")
            .contains("not the same time: with a teacher")
    );
}

#[test]
fn uneven_speeds_of_equal_work_are_told() {
    let mut r = results();
    assert!(!caveats(&r).join("\n").contains("uneven"));
    // Half the steps, or twice the depth, is other work.
    r.rows.last_mut().unwrap().images_per_second = Some(30.0);
    let said = caveats(&r).join("\n");
    assert!(
        said.contains("30 to 38 images/s with 8 blocks and 25 steps."),
        "{said}"
    );
}

#[test]
fn a_study_is_judged_class_by_class() {
    let mut r = crate::sample::study();
    let all = findings(&r);
    let questions: Vec<&str> = all.iter().map(|f| f.question).collect();
    // The tests over seeds stand in the place of the comparisons with random masks one by one.
    assert_eq!(questions[0], "Does the learned mask beat its rivals?");
    assert!(
        !questions
            .iter()
            .any(|q| q.contains("random") || q.contains("oracle"))
    );
    let learned = &all[0].answers;
    assert_eq!(learned.len(), 8);
    assert!(
        learned[0]
            .1
            .starts_with("learned 2:4, fine-tuned, 200 steps: by FID better than "),
        "{}",
        learned[0].1
    );
    assert!(
        learned[0].1.contains(" of 3 rivals, worse than 0, "),
        "{}",
        learned[0].1
    );
    assert!(
        headline(&r).contains(" of 16 comparisons by FID, worse in 0"),
        "{}",
        headline(&r)
    );
    // Every recovery with a teacher against the same mask with the same budget: the gain is 5 in each.
    let kd = answers(&r, "masked distillation");
    assert_eq!(kd.len(), 4);
    assert!(
        kd[0].1.starts_with("8 blocks, 200 steps: mean FID "),
        "{}",
        kd[0].1
    );
    assert!(
        kd[0]
            .1
            .contains("over 6 pairs of equal masks, of which 6 are better with KD"),
        "{}",
        kd[0].1
    );
    // Only what is alike is correlated.
    let rho = answers(&r, "predict");
    assert_eq!(rho.len(), 4);
    for (_, text) in &rho {
        assert!(
            text.contains("blocks, fine-tuning, ") && text.contains(" recoveries of "),
            "{text}"
        );
    }
    // Short: the best of a class stands for its learned masks.
    assert_eq!(answers(&r, "fewer steps").len(), 4 + 1);
    let said = caveats(&r).join("\n");
    assert!(
        !said.contains("only. Masks"),
        "both patterns are drawn from: {said}"
    );
    assert!(said.contains("± is the standard deviation over seeds of search and recovery"));
    assert!(said.contains("another set of samples would change is not in it"));
    r.rows
        .retain(|row| row.criterion != "random" || row.pattern.as_deref() == Some("2:4"));
    let said = caveats(&r).join("\n");
    assert!(
        said.contains("drawn from 2:4 only. Masks learned with 3:4"),
        "{said}"
    );
}

#[test]
fn with_one_seed_a_study_meets_the_control_of_its_own_class() {
    let mut r = crate::sample::study();
    r.rows.retain(|row| row.repetition() == 0);
    r.random = crate::aggregate::Aggregate::of(&r.rows);
    let median = answers(&r, "median random");
    // 57 against 60 and 61, and so on: each is better than both of its class. Against the pool of all classes, 10 to 61, the
    // one of 11 blocks and 600 steps alone would be.
    assert_eq!(median.len(), 4);
    for (verdict, text) in &median {
        assert_eq!(*verdict, Verdict::Yes, "{text}");
        assert!(text.contains("2 masks"), "{text}");
    }
    assert!(
        median[0]
            .1
            .contains("against a median of 60.5 (60 to 61, 2 masks)"),
        "{}",
        median[0].1
    );
    let every = answers(&r, "every random");
    assert!(
        every
            .iter()
            .all(|a| a.0 == Verdict::Yes && a.1.contains("beats 2 of 2")),
        "{every:?}"
    );
    let oracle = answers(&r, "oracle");
    assert_eq!(oracle.len(), 8);
    for (_, text) in &oracle {
        // One apart in every class, which is the spread there.
        assert!(
            text.contains("less than the spread of the random masks (1)") || text.contains("a tie"),
            "{text}"
        );
    }
    let budget = measure::budget(&r);
    assert!(budget.contains("10 pairs of rows"), "{budget}");
    assert!(
        headline(&r).contains("better than every random mask."),
        "{}",
        headline(&r)
    );
}

#[test]
fn without_random_masks_a_difference_is_not_called_a_win() {
    let mut r = results();
    r.rows.retain(|row| row.criterion != "random");
    r.random.clear();
    for (verdict, text) in answers(&r, "oracle") {
        assert_eq!(verdict, Verdict::Unclear, "{text}");
        assert!(
            text.contains("without comparable random masks or seeds"),
            "{text}"
        );
    }
    // A study says nothing of questions that it does not ask.
    r.study = Some(serde_json::from_str(r#"{"kind": "table5"}"#).unwrap());
    assert!(
        findings(&r)
            .iter()
            .all(|f| !f.question.contains("random mask"))
    );
    assert!(!headline(&r).contains("random"), "{}", headline(&r));
}

#[test]
fn a_baseline_is_answered_for_all_at_once() {
    let mut r = crate::sample::study();
    let against =
        r#"{"kind": "table5", "against": [{"column": "recovery", "value": "fine-tuning"}]}"#;
    r.study = Some(serde_json::from_str(against).unwrap());
    // KD gains 5 in every mask and seed, which is no noise to test by: let it vary.
    for row in r
        .rows
        .iter_mut()
        .filter(|r| r.recovery == Recovery::MaskedKd)
    {
        row.fid = row.fid.map(|f| f + 0.001 * row.seed as f64);
    }
    let all = answers(&r, "better than the baseline");
    assert_eq!(all.len(), 2, "one for each measure");
    let again = |f: &Finding| f.question.contains("masked distillation");
    assert!(!findings(&r).iter().any(again));
    assert_eq!(all[0].0, Verdict::Yes);
    assert!(
        all[0]
            .1
            .starts_with("by FID, 10 of 10 comparisons are won (oracle"),
        "{}",
        all[0].1
    );
    assert!(
        headline(&r).contains("better than their baseline in 10 of 10 comparisons"),
        "{}",
        headline(&r)
    );
}

#[test]
fn many_learned_masks_of_a_study_are_not_told_twice() {
    let mut r = results();
    r.study = Some(serde_json::from_str(r#"{"kind": "table4"}"#).unwrap());
    let asked = |r: &Results| {
        let every = |f: &Finding| f.question.contains("every random");
        findings(r).iter().any(every)
    };
    assert!(asked(&r));
    let row = r
        .rows
        .iter()
        .find(|r| r.id == "learned-1-2-ft")
        .unwrap()
        .clone();
    for i in 0..6 {
        r.rows.push(ResultRow {
            id: format!("learned-{i}"),
            ..row.clone()
        });
    }
    assert!(!asked(&r));
}
