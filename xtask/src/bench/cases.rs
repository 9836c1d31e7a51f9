//! From a preset's cases to their results.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::flops::{flops, of_copy, of_matmul};
use super::measure::{Entry, Lab, Outcome, Prepared, Setting};
use super::preset::{Case, Contender, Goals, Kind, Scaling};
use super::progress::Progress;
use super::results::{
    CaseResult, ContenderResult, ScalingPoint, ScalingResult, Spread, compare, judge,
};

/// Steps of a probe: they are short, and the best one counts.
const PROBE_ROUNDS: usize = 15;

/// What the floors are taken from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Operations per second.
    pub(crate) flops: f64,
    /// Bytes read and written per second.
    pub(crate) bandwidth: f64,
    /// Threads that both were measured with.
    pub(crate) threads: usize,
}

/// The versions that the workers told.
pub(crate) type Versions = BTreeMap<String, String>;

/// Measures the machine's limits with both contenders: the best step of either counts.
pub(crate) fn probes(
    lab: &Lab,
    threads: usize,
    progress: &Progress,
    versions: &mut Versions,
) -> Result<(Limits, Vec<CaseResult>)> {
    let mut results = Vec::new();
    let mut best = Vec::new();
    for (kind, work) in [(Kind::Matmul, of_matmul()), (Kind::Copy, of_copy())] {
        let case = Case {
            name: kind.word().into(),
            kind,
            model: "DiT-S/2".into(),
            batch: 1,
            contenders: vec![Contender::Ours, Contender::Eager],
            goals: Goals::default(),
            micro_batches: None,
            seconds: 0.0,
        };
        let tick = |share: f64| progress.tick(share);
        let result = compared(lab, &case, threads, PROBE_ROUNDS, None, tick, versions)?;
        let least = result.contenders.iter().map(|c| c.spread.least);
        best.push(work / least.fold(f64::INFINITY, f64::min));
        results.push(result);
    }
    let limits = Limits {
        flops: best[0],
        bandwidth: best[1],
        threads,
    };
    Ok((limits, results))
}

/// Measures one case; without limits no floor is known.
pub(crate) fn compared(
    lab: &Lab,
    case: &Case,
    threads: usize,
    rounds: usize,
    limits: Option<Limits>,
    tick: impl Fn(f64),
    versions: &mut Versions,
) -> Result<CaseResult> {
    let setting = Setting {
        kind: case.kind,
        model: case.model.clone(),
        batch: case.batch,
        threads,
        depth: None,
        input_size: None,
        micro_batches: case.micro_batches,
    };
    let whole = lab.prepare(&case.name, &setting)?;
    let contenders = lab.present(&case.contenders);
    let half = contenders
        .contains(&Contender::Half)
        .then(|| {
            let mut setting = setting.clone();
            setting.depth = whole.model.as_ref().map(|m| m.depth / 2);
            lab.prepare(&format!("{} half", case.name), &setting)
        })
        .transpose()?;
    let of = |contender: Contender| match &half {
        Some(half) if contender == Contender::Half => half,
        _ => &whole,
    };
    let entries: Vec<Entry<'_>> = contenders
        .iter()
        .map(|&contender| Entry {
            name: format!("{}, {}", case.name, contender.name()),
            contender,
            case: of(contender),
        })
        .collect();
    let turns = lab.alternate(&entries, rounds, tick)?;
    let mut found = Vec::new();
    for (entry, outcome) in entries.iter().zip(turns.outcomes) {
        versions.extend(outcome.versions.clone());
        found.push(contender_result(entry, case, limits, outcome));
    }
    let least_flops = work(&whole, case, Contender::Ours);
    let comparisons = compare(&found);
    Ok(CaseResult {
        name: case.name.clone(),
        kind: case.kind,
        model: case.model.clone(),
        batch: case.batch,
        commands: [Some(&whole), half.as_ref()]
            .into_iter()
            .flatten()
            .map(|p| p.command.clone())
            .collect(),
        least_flops,
        cores_of_others: turns.others,
        floor_seconds: limits.map(|l| least_flops / l.flops),
        goals: judge(&case.goals, &comparisons),
        contenders: found,
        comparisons,
    })
}

fn contender_result(
    entry: &Entry<'_>,
    case: &Case,
    limits: Option<Limits>,
    outcome: Outcome,
) -> ContenderResult {
    let spread = Spread::of(&outcome.seconds);
    let flops = work(entry.case, case, entry.contender);
    let flops_per_second = flops / spread.median;
    ContenderResult {
        contender: entry.contender,
        command: outcome.command,
        seconds: outcome.seconds,
        spread,
        flops,
        flops_per_second,
        of_peak: limits.map(|l| flops_per_second / l.flops),
        ready_rss_bytes: outcome.ready_rss_bytes,
        peak_rss_bytes: outcome.last.peak_rss_bytes,
        difference: outcome.last.difference,
    }
}

/// Operations of a contender's step: ours takes no gradient that nothing asks for, PyTorch takes all.
fn work(prepared: &Prepared, case: &Case, contender: Contender) -> f64 {
    let Some(model) = &prepared.model else {
        // The probes have no model.
        return if case.kind == Kind::Matmul {
            of_matmul()
        } else {
            0.0
        };
    };
    let cost = flops(case.kind, model, prepared.student.as_ref(), case.batch);
    if contender.is_python() {
        cost.plain
    } else {
        cost.least
    }
}

/// The tables that `--scaling` asks for: kind, size and its values.
pub(crate) fn scalings(preset: &Scaling) -> Vec<(Kind, &'static str, Vec<usize>)> {
    let over = &preset.over;
    let sizes = [
        ("depth", &over.depth),
        ("batch", &over.batch),
        ("tokens", &over.input_size),
        ("threads", &over.threads),
    ];
    let of = |kind: &Kind| sizes.map(|(size, values)| (*kind, size, values.clone()));
    preset.kinds.iter().flat_map(of).collect()
}

/// Name of such a table.
pub(crate) fn scaling_name(kind: Kind, size: &str) -> String {
    format!("scaling, {} over {size}", kind.word())
}

/// Measures ours over the values of one size, in turn.
pub(crate) fn scaled(
    lab: &Lab,
    preset: &Scaling,
    (kind, over, values): (Kind, &'static str, &[usize]),
    limits: Limits,
    tick: impl Fn(f64),
) -> Result<ScalingResult> {
    let setting = |value: usize| {
        let pick = |size: &str, usual: usize| if size == over { value } else { usual };
        Setting {
            kind,
            model: preset.model.clone(),
            batch: pick("batch", preset.batch),
            threads: pick("threads", limits.threads),
            depth: Some(pick("depth", preset.depth)),
            input_size: Some(pick("tokens", preset.input_size)),
            micro_batches: None,
        }
    };
    let name = scaling_name(kind, over);
    let settings: Vec<Setting> = values.iter().map(|v| setting(*v)).collect();
    let cases = values
        .iter()
        .zip(&settings)
        .map(|(value, setting)| lab.prepare(&format!("{name} {value}"), setting))
        .collect::<Result<Vec<_>>>()?;
    let entries: Vec<Entry<'_>> = values
        .iter()
        .zip(&cases)
        .map(|(value, case)| Entry {
            name: format!("{name} {value}"),
            contender: Contender::Ours,
            case,
        })
        .collect();
    let turns = lab.alternate(&entries, preset.rounds, tick)?;
    let mut points = Vec::new();
    for (((value, setting), case), outcome) in
        values.iter().zip(&settings).zip(&cases).zip(turns.outcomes)
    {
        let model = case
            .model
            .as_ref()
            .with_context(|| format!("{name}: no model"))?;
        let flops = flops(kind, model, None, setting.batch).least;
        let bytes = model.bytes(kind, setting.batch);
        // Fewer threads have their share of the cores; the memory is the same.
        let share = setting.threads as f64 / limits.threads as f64;
        points.push(ScalingPoint {
            value: if over == "tokens" {
                model.tokens()
            } else {
                *value
            },
            spread: Spread::of(&outcome.seconds),
            flops,
            bytes,
            compute_floor_seconds: flops / (limits.flops * share.min(1.0)),
            memory_floor_seconds: bytes / limits.bandwidth,
            peak_rss_bytes: outcome.last.peak_rss_bytes,
        });
    }
    Ok(ScalingResult {
        kind,
        model: preset.model.clone(),
        over,
        cores_of_others: turns.others,
        points,
    })
}
