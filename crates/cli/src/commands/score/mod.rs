mod options;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::Result;
use serde_json::json;
use tinyfusion::checkpoint::{CONFIG_FILE, write_atomic};
use tinyfusion::core::Error;
use tinyfusion::data::Order;
use tinyfusion::data::shapes::Split;
use tinyfusion::recover::criteria::{Criterion, Judgement, Subject, keep_probabilities};
use tinyfusion::train::Stop;

use self::options::{Options, criterion};
use super::learn;
use crate::family::{Architecture, Family, Model, with_family};
use crate::hub::Inputs;
use crate::output::progress_bar;
use crate::resources::Resources;
use crate::selection_file::{SELECTION_FILE, read_selection, write_selection};

/// Choose blocks by a criterion that does not train, or by the learned one for comparison.
///
/// Writes selection.json, and scores.json with the scores of blocks or masks and their standard errors. Blocks of the
/// lowest scores go. With --pattern the choice is made within groups, with --keep over the whole network.
///
/// Examples:
///   tinyfusion score assets/teacher runs/oracle --criterion oracle
///   tinyfusion score assets/teacher runs/random --criterion random --pattern 1:2 --seed 3
///   tinyfusion score assets/teacher runs/shortgpt --criterion block-influence --keep 8 --samples 512
///   tinyfusion score assets/teacher runs/median --criterion random-search --masks 200 --quantile 0.5
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// The dense network, a model as `inspect` takes it: PATH or hub://OWNER/REPO, with [#WORD,…]
    model: PathBuf,
    /// Folder that gets selection.json and scores.json
    out: PathBuf,
    #[command(flatten)]
    options: Options,
}

/// Name of the file of scores beside the selection.
const SCORES_FILE: &str = "scores.json";

/// Samples of a calibration batch. A MAR draws one mask rate per batch, so that many small ones say more than few large.
const BATCH: u64 = 32;

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default()
            .and([&mut self.model])
            .and(self.options.data.origin())
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    args.options.check()?;
    if args.out.join(CONFIG_FILE).exists() {
        return Err(Error::usage(format!(
            "{} is a model's folder: the selection in it would be taken for the one that cut the model; use another",
            args.out.display()
        ))
        .into());
    }
    with_family!(Architecture::of(&args.model)?, score(args, stop))
}

fn score<F: Family>(args: &Args, stop: &Stop) -> Result<()> {
    let resources = Resources::start();
    let options = &args.options;
    let model = Model::<F>::load_on(&args.model, &options.compute.open()?)?;
    let criterion = criterion::<F::Net, F::Objective>(options);
    let is_learned = criterion.is_none();
    if let Some(criterion) = &criterion {
        check_place(&args.out, criterion.name())?;
    }
    let mut judgement = match criterion {
        Some(criterion) => judge(criterion, options, &model, stop)?,
        None => {
            learn::run(&options.learn(&args.model, &args.out), stop)?;
            let selection = read_selection(&args.out.join(SELECTION_FILE))?;
            Judgement {
                blocks: keep_probabilities(&selection)?,
                masks: Vec::new(),
                selection,
            }
        }
    };
    judgement.selection.source_sha256 = Some(model.sha256.clone());
    let selection = &judgement.selection;
    let place = args.out.join(SELECTION_FILE);
    if place.exists() && read_selection(&place).ok().as_ref() != Some(selection) {
        return Err(Error::usage(format!(
            "{}: another selection stands there, perhaps a learned one; use another folder",
            place.display()
        ))
        .into());
    }
    std::fs::create_dir_all(&args.out).map_err(|e| Error::file(&args.out, e))?;
    let scores = json!({
        "criterion": selection.criterion,
        "settings": selection.settings,
        "model": args.model,
        "model_sha256": model.sha256,
        "dtype": model.compute.numbers(),
        "data": options.data_used(),
        "samples": options.samples_used(),
        "kept": selection.kept,
        "blocks": judgement.blocks,
        "masks": judgement.masks,
    });
    write_atomic(args.out.join(SCORES_FILE), |f| {
        f.write_all(format!("{scores:#}\n").as_bytes())
    })?;
    if !is_learned {
        write_selection(&args.out, selection)?;
        resources.write(&args.out, None)?;
    }
    Ok(())
}

/// An error where the selection of another criterion stands in `out`: said before the work. Of the same criterion it may
/// be the same selection, which is known after it.
fn check_place(out: &Path, criterion: &str) -> Result<()> {
    let place = out.join(SELECTION_FILE);
    let there = match read_selection(&place) {
        Ok(selection) if selection.criterion == criterion => return Ok(()),
        Err(_) if !place.exists() => return Ok(()),
        Ok(selection) => format!("a selection by {}", selection.criterion),
        Err(_) => "a file that is no selection".into(),
    };
    Err(Error::usage(format!(
        "{}: {there} stands there; use another folder",
        place.display()
    ))
    .into())
}

/// Runs a criterion that does not train.
fn judge<F: Family>(
    criterion: Box<dyn Criterion<F::Net, F::Objective>>,
    options: &Options,
    model: &Model<F>,
    stop: &Stop,
) -> Result<Judgement> {
    let (net, objective) = (
        model.network()?,
        F::objective(&model.config, &model.process, true)?,
    );
    let samples = options.samples_used().unwrap_or(0);
    // Training samples: what is held out stays so. Opened by the first who asks, since some criteria look at no data.
    let source = RefCell::new(None);
    let batches = |k: u64| {
        let mut source = source.borrow_mut();
        if source.is_none() {
            let opened = options.data.open(model, Split::Train);
            // A closure of the library's errors: one of them keeps its exit code.
            let opened = opened.map_err(|e| match e.downcast::<Error>() {
                Ok(error) => error,
                Err(other) => Error::run(format!("{other:#}")),
            })?;
            if let Some(len) = opened.len().filter(|len| *len < samples) {
                return Err(Error::usage(format!(
                    "{} has {len} images, fewer than the --samples {samples} asked for",
                    options.data.name()
                )));
            }
            let order = Order::new(opened.len(), options.seed())?;
            *source = Some((opened, order));
        }
        let Some((source, order)) = source.as_mut() else {
            return Err(Error::run("the data was not opened"));
        };
        let size = BATCH.min(samples - k * BATCH);
        let mut indices = order.batch_indices(k, BATCH as usize)?;
        indices.truncate(size as usize);
        source.batch(&indices)?.to_device(&model.compute.device)
    };
    let done = AtomicU64::new(0);
    let mut subject = Subject {
        net: &net,
        weights: &model.weights,
        block_of: &|name| model.block_of(name),
        objective: &objective,
        choice: options.choice(&model.layout())?,
        batches: &batches,
        batch_count: samples.div_ceil(BATCH),
        seed: options.seed(),
        lanes: model
            .compute
            .lanes(tinyfusion::train::FitConfig::default().lanes),
        passed: &|| Ok(()),
    };
    let progress = progress_bar(criterion.name(), criterion.passes(&subject));
    let passed = || {
        progress.set(done.fetch_add(1, Relaxed) + 1, String::new());
        if stop.requested() {
            return Err(Error::Stopped);
        }
        Ok(())
    };
    subject.passed = &passed;
    let judgement = criterion.choose(&subject)?;
    progress.finish();
    Ok(judgement)
}
