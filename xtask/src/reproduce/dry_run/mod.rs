//! `reproduce --dry-run`: what a preset would do, download, need and cost, without doing it.

mod cost;
mod measure;
mod rates;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::plan::on_hub;
use super::stage::Driver;
use super::{Leftover, Part, missing};
use crate::files;
use cost::{Cost, Costs};
use rates::Rates;

/// What `tinyfusion pull --list` says of one place.
#[derive(Deserialize)]
struct Listed {
    bytes: u64,
    to_download: u64,
    files: Vec<serde_json::Value>,
}

/// Prints the stages of all parts, then downloads, what is missing, and the estimate.
pub(super) fn run(parts: &[Part], lock: &Path) -> Result<()> {
    let rates = measured(parts)?;
    let mut totals = Vec::new();
    let mut encoded = BTreeSet::new();
    for part in parts {
        println!("\n== {}\n", part.preset.name);
        let mut costs: Vec<Cost> = match rates.get(&part.preset.model) {
            Some(rates) => Costs::new(&part.preset, rates).of_stages(&part.plan.stages),
            // What the preset itself expects on two cores.
            None => part.plan.stages.iter().map(Cost::expected).collect(),
        };
        // Latents that an earlier part has encoded are there already.
        for (stage, cost) in part.plan.stages.iter().zip(&mut costs) {
            if stage.leftover == Leftover::Shared && !encoded.insert(stage.folder.clone()) {
                *cost = Cost::default();
            }
        }
        for (i, (stage, cost)) in part.plan.stages.iter().zip(&costs).enumerate() {
            let number = i + 1;
            println!("[{number}/{}] {}: {cost}", costs.len(), stage.name);
            println!("$ {}", part.driver.command(stage));
        }
        totals.push((part.preset.name.as_str(), Cost::sum(&costs)));
    }
    println!("\n== Downloads\n");
    let Downloads { bytes, unlisted } = downloads(parts, lock)?;
    println!("\n== Estimate\n");
    estimate(parts, &totals);
    disk(parts, &totals, bytes);
    println!("\n== Missing\n");
    let missing = missing::of(parts);
    for m in &missing {
        println!("{}: {}", m.path.display(), m.advice);
    }
    for place in &unlisted {
        println!("{place}: its files are not in the cache, and the hub cannot be asked");
    }
    if parts.iter().any(|p| p.preset.model.is_some()) {
        match gpus() {
            Some(found) => println!(
                "nothing for a GPU ({found}): the estimate is of the processor's cores all the same"
            ),
            None => println!(
                "an NVIDIA GPU: none is found, so the estimate is of the processor's cores"
            ),
        }
    }
    if missing.is_empty() && unlisted.is_empty() {
        println!("nothing that is read: the same command without --dry-run begins");
    }
    Ok(())
}

/// The NVIDIA GPUs of this machine, if its driver tells of any.
fn gpus() -> Option<String> {
    let out = Command::new("nvidia-smi").arg("-L").output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    let first = text.lines().next()?.trim();
    (out.status.success() && !first.is_empty()).then(|| first.to_string())
}

/// What comes from the hub.
struct Downloads {
    /// That are still to come, as far as they are known.
    bytes: f64,
    /// Places of which the hub tells nothing now.
    unlisted: Vec<String>,
}

/// What stays on disk, and whether there is room.
fn disk(parts: &[Part], totals: &[(&str, Cost)], downloads: f64) {
    let Some(part) = parts.first() else { return };
    let made: f64 = totals.iter().map(|(_, total)| total.disk).sum();
    if made == 0.0 {
        return;
    }
    let needed = made + downloads;
    print!(
        "on disk: {} of downloads and {} made by the stages",
        gigabytes(downloads as u64),
        gigabytes(made as u64)
    );
    match files::free_space(&part.driver.out) {
        Some(free) if (free as f64) < needed => println!(
            "; {} has {} free, which is too little: --out chooses another disk, and finished rows' samples may be removed",
            part.driver.out.display(),
            gigabytes(free)
        ),
        Some(free) => println!("; {} are free", gigabytes(free)),
        None => println!(),
    }
}

/// The rates of every network that a preset names.
fn measured(parts: &[Part]) -> Result<BTreeMap<Option<String>, Rates>> {
    let mut all = BTreeMap::new();
    for Part { preset, driver, .. } in parts {
        let Some(model) = &preset.model else { continue };
        if !all.contains_key(&preset.model) {
            println!("measuring steps of {model} with few blocks and random weights");
            let folder = driver.out.join("dry-run");
            let rates = Rates::measure(driver, preset, model, &folder);
            files::remove(&folder)?;
            let rates = rates.with_context(|| format!("measuring {model}"))?;
            all.insert(preset.model.clone(), rates);
        }
    }
    Ok(all)
}

/// Prints every place on the hub with its size: as the hub lists it or, where it cannot be asked, as the preset says.
fn downloads(parts: &[Part], lock: &Path) -> Result<Downloads> {
    let words = parts
        .iter()
        .flat_map(|p| &p.plan.stages)
        .flat_map(|s| &s.args);
    let places: BTreeSet<&str> = words
        .filter(|word| on_hub(word))
        .map(|word| word.split('#').next().unwrap_or(word))
        .collect();
    let (mut bytes, mut unlisted) = (0.0, Vec::new());
    let Some(Part { driver, .. }) = parts.first() else {
        return Ok(Downloads { bytes, unlisted });
    };
    let said = parts.iter().flat_map(|p| &p.preset.on_hub);
    let said: BTreeMap<&str, f64> = said.map(|s| (s.place.as_str(), s.gigabytes)).collect();
    for &place in &places {
        match listed(driver, place, lock)? {
            Ok(found) => {
                println!(
                    "{place}: {} files, {}, of which {} are to be downloaded",
                    found.files.len(),
                    gigabytes(found.bytes),
                    gigabytes(found.to_download)
                );
                bytes += found.to_download as f64;
            }
            Err(why) => {
                match said.get(place) {
                    Some(size) => println!("{place}: about {size} GB, by the preset ({why})"),
                    None => println!("{place}: size unknown ({why})"),
                }
                bytes += said.get(place).map_or(0.0, |size| size * 1e9);
                unlisted.push(place.to_string());
            }
        }
    }
    let by_hand = parts.iter().flat_map(|p| &p.preset.by_hand);
    let by_hand: BTreeMap<&Path, _> = by_hand.map(|b| (b.path.as_path(), b)).collect();
    for (path, what) in &by_hand {
        let there = if path.exists() { "there" } else { "missing" };
        println!("{} (by hand, {there}): {}", path.display(), what.say());
    }
    if places.is_empty() && by_hand.is_empty() {
        println!("none");
    }
    Ok(Downloads { bytes, unlisted })
}

/// What the binary finds at a place, or why it finds nothing.
fn listed(
    driver: &Driver,
    place: &str,
    lock: &Path,
) -> Result<std::result::Result<Listed, String>> {
    let mut command = Command::new(driver.absolute_binary());
    command.args(["pull", place, "--list", "--lock"]).arg(lock);
    let out = command.output().context("the binary cannot be started")?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        let last = said.lines().last().unwrap_or("no reason given");
        return Ok(Err(last.trim_start_matches("error: ").to_string()));
    }
    let mut all: Vec<Listed> =
        serde_json::from_slice(&out.stdout).context("what `pull --list` printed")?;
    let one = all.pop().context("`pull --list` printed nothing")?;
    Ok(Ok(one))
}

fn estimate(parts: &[Part], totals: &[(&str, Cost)]) {
    for (name, total) in totals {
        println!("{name}: {total}");
    }
    if let [_, _, ..] = totals {
        let all: Vec<Cost> = totals.iter().map(|(_, total)| total.clone()).collect();
        println!("together: {}", Cost::sum(&all));
    }
    let Some(part) = parts.first() else { return };
    let machine = &part.driver.machine;
    println!(
        "\non this machine: {}, {} cores, {} of memory; everything runs on the CPU",
        machine.cpu.as_deref().unwrap_or("unknown processor"),
        machine.cores,
        machine
            .memory_bytes
            .map_or("an unknown amount".into(), gigabytes)
    );
    let largest = totals
        .iter()
        .filter_map(|(_, total)| total.bytes)
        .fold(0.0, f64::max);
    if let Some(memory) = machine.memory_bytes
        && largest > memory as f64
    {
        println!(
            "the largest stage needs {}, more than there is: add `micro-batches` to [learn] and [recover] (or `recompute` \
             by hand), or run the printed commands on a larger machine",
            gigabytes(largest as u64)
        );
    }
    if parts.iter().any(|p| p.preset.model.is_none()) {
        println!("presets without `model`: the times are those that they expect on two cores");
    }
    if totals.iter().any(|(_, total)| total.unknown > 0) {
        println!("stages without an estimate are not in the sums");
    }
}

fn gigabytes(bytes: u64) -> String {
    match bytes {
        0..10_000_000 => format!("{:.2} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
