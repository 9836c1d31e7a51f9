use std::io;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::report::{self, Part, Results, Section, Source};

use crate::output::say;

/// Tables, plots and statements of finished experiments, of one or of several side by side.
///
/// Runs of one preset under other seeds become seeds of the same rows, with means, standard deviations and paired tests of
/// the learned masks against their rivals; other presets become sections of their own. Runs whose numbers cannot be compared
/// (features, reference, number of samples, or other settings of the same preset) are refused.
///
/// Examples:
///   tinyfusion report runs/tiny --out runs/report
///   tinyfusion report runs/table1-seed-0 runs/table1-seed-1 runs/table3 --format html,latex
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Folders of finished runs of `cargo xtask reproduce`, or their results.json
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Folder for report.html, report.md, results.csv and rows.tex
    #[arg(long, value_name = "DIR", default_value = "runs/report")]
    out: PathBuf,
    /// What to write
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "html,md,csv,latex"
    )]
    format: Vec<Format>,
    /// Put runs side by side that cannot be compared; the report says so
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Html,
    Md,
    Csv,
    Latex,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut sources = Vec::new();
    refuse_own_folder(args)?;
    for run in &args.runs {
        sources.extend(read(run)?);
    }
    let merged = report::merge(sources, args.force).map_err(|e| Error::usage(e.to_string()))?;
    let parts = merged
        .sections
        .iter()
        .map(drawn)
        .collect::<Result<Vec<Part>>>()?;
    let pages = report::combined(&parts, &merged);
    std::fs::create_dir_all(&args.out)
        .map_err(|e| Error::file(&args.out, format!("cannot be made: {e}")))?;
    let files = [
        (Format::Html, "report.html", &pages.html),
        (Format::Md, "report.md", &pages.markdown),
        (Format::Csv, "results.csv", &pages.csv),
        (Format::Latex, "rows.tex", &pages.latex),
    ];
    for (_, name, text) in files.iter().filter(|(f, ..)| args.format.contains(f)) {
        let path = args.out.join(name);
        write_atomic(&path, |file| file.write_all(text.as_bytes()))?;
        say!("{}", path.display())?;
    }
    Ok(())
}

/// A run's own report shows more than a combined one: it must not be replaced.
fn refuse_own_folder(args: &Args) -> Result<()> {
    let folder = |run: &Path| match run.is_dir() {
        true => run.canonicalize().ok(),
        false => run.canonicalize().ok()?.parent().map(Path::to_path_buf),
    };
    let out = args.out.canonicalize().ok();
    match args.runs.iter().find(|run| out.is_some() && folder(run) == out) {
        None => Ok(()),
        Some(run) => Err(Error::usage(format!(
            "--out {}: would replace the report of the run {}, which has more in it; give another folder",
            args.out.display(),
            run.display()
        ))
        .into()),
    }
}

/// The experiments of a run.
fn read(run: &Path) -> Result<Vec<Source>> {
    let file = if run.is_dir() {
        run.join("results.json")
    } else {
        run.to_path_buf()
    };
    let name = file.display().to_string();
    let text = std::fs::read_to_string(&file).map_err(|e| {
        Error::usage(format!(
            "{name} cannot be read: {e}; expected the folder of a finished run of `cargo xtask reproduce`, or its results.json"
        ))
    })?;
    let mut sources = report::parse(&name, &text).map_err(|e| Error::usage(e.to_string()))?;
    let folder = file.parent().unwrap_or(Path::new(""));
    for source in &mut sources {
        // The parts of a recipe lie in folders of their own.
        let own = folder.join(&source.results.preset);
        let folder = if own.is_dir() { &own } else { folder };
        find_traces(&mut source.results, folder);
    }
    Ok(sources)
}

/// Says the files of plots from here, and not from the run's folder.
fn find_traces(results: &mut Results, folder: &Path) {
    for row in &mut results.rows {
        let traces = &mut row.traces;
        let files = [
            &mut traces.history,
            &mut traces.selection,
            &mut traces.activations,
        ];
        for file in files.into_iter().flatten() {
            *file = folder.join(&*file);
        }
    }
}

/// A section with the plots of its study, or of any experiment.
fn drawn(section: &Section) -> Result<Part> {
    let read = |path: &Path| -> io::Result<String> { std::fs::read_to_string(path) };
    let figures = match section.results.study {
        Some(_) => {
            report::study_figures(&section.results, &read).map_err(|e| Error::run(e.to_string()))?
        }
        None => report::plain_figures(&section.results),
    };
    Ok(Part {
        section: section.clone(),
        figures,
    })
}
