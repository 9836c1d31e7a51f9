//! The report of one experiment.

use crate::results::Results;
use crate::{findings, html, markdown};

/// A picture made of the run's own files.
#[derive(Debug, Clone)]
pub struct Figure {
    /// Its heading.
    pub title: String,
    /// What is to be seen.
    pub caption: String,
    /// The picture, as [`crate::plots`] draws it.
    pub svg: String,
    /// Names and colours of its lines or dots, see [`crate::plots::series`].
    pub legend: Vec<(usize, String)>,
}

/// A grid of samples.
#[derive(Debug, Clone)]
pub struct Grid {
    /// The row that drew them.
    pub name: String,
    /// Shown below.
    pub caption: String,
    /// `data:` address of the PNG.
    pub address: String,
}

/// A finished experiment with its pictures.
#[derive(Debug, Clone)]
pub struct Report {
    /// Every number.
    pub results: Results,
    /// The plots.
    pub figures: Vec<Figure>,
    /// The samples.
    pub grids: Vec<Grid>,
}

impl Report {
    /// `report.html`: one file, nothing fetched.
    pub fn html(&self) -> String {
        html::report(&self.results, &self.figures, &self.grids)
    }

    /// `report.md`: all but the pictures.
    pub fn markdown(&self) -> String {
        markdown::report(&self.results)
    }

    /// `table.md`: the results in few columns, to be pasted elsewhere.
    pub fn summary(&self) -> String {
        markdown::summary(&self.results)
    }

    /// The answer in one sentence.
    pub fn headline(&self) -> String {
        findings::headline(&self.results)
    }
}
