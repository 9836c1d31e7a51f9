use super::*;
use crate::html::tests::well_formed;
use crate::merge::{Source, merge};
use crate::sample::results;

fn pages(force: bool, change: impl Fn(&mut Results)) -> Pages {
    let source = |seed: u64| {
        let mut results = results();
        results.settings = serde_json::json!({"seed": seed});
        for row in &mut results.rows {
            // Seeds differ by little, and not by the same for every method.
            let bump = seed as f64 * (0.1 + row.id.len() as f64 / 100.0);
            row.fid = row.fid.map(|f| f + bump);
        }
        change(&mut results);
        Source {
            name: format!("run <{seed}>"),
            results,
        }
    };
    let merged = merge(vec![source(0), source(1), source(2)], force).unwrap();
    let part = |section: &Section| Part {
        section: section.clone(),
        figures: crate::plain_figures(&section.results),
    };
    let parts: Vec<Part> = merged.sections.iter().map(part).collect();
    combined(&parts, &merged)
}

#[test]
fn every_page_tells_the_same_numbers() {
    let pages = pages(false, |_| {});
    well_formed(&pages.html);
    for forbidden in ["src=\"http", "href=", "<script", "@import", "url("] {
        assert!(!pages.html.contains(forbidden), "{forbidden}");
    }
    // learned-2-4-kd: 13, 13.24, 13.48: mean 13.24, deviation 0.24.
    for (text, cell) in [
        (&pages.html, "<strong>13.24 ± 0.24</strong>"),
        (&pages.markdown, "**13.24 ± 0.24**"),
        (&pages.latex, "\\textbf{13.24 $\\pm$ 0.24}"),
    ] {
        assert!(text.contains(cell), "{cell} is missing in\n{text}");
    }
    assert!(pages.html.contains("run &lt;0&gt; and run &lt;1&gt;"));
    // 12 rows of 3 runs, and the head.
    assert_eq!(pages.csv.lines().count(), 37);
    assert!(pages.csv.contains(
        "\r\nmade-up,DiT,random-1-2-ft,random-1-2-seed-2-ft,\"random 1:2, seed 2, fine-tuned\","
    ));
    assert!(pages.csv.contains(",measured\r\n"));
}

#[test]
fn the_statements_name_winners_losers_and_noise() {
    let text = pages(false, |_| {}).markdown;
    assert!(text.contains("### Learned against its rivals"), "{text}");
    assert!(
        text.contains("| learned 1:2 (lora), fine-tuned | oracle (BK-SDM), fine-tuned | FID | −"),
        "{text}"
    );
    // The held-out losses of the runs are equal: there is no noise to measure by.
    assert!(text.contains("the same difference in 3 seeds"), "{text}");
    let lost = pages(false, |r| {
        let rows = r.rows.iter_mut().filter(|row| row.criterion == "oracle");
        rows.for_each(|row| row.fid = row.fid.map(|f| f - 20.0));
    });
    assert!(lost.markdown.contains("| No |"), "{}", lost.markdown);
    assert!(lost.html.contains(": it loses."), "in words");
    assert!(lost.html.contains("<b class=\"no\">No</b>"));
}

#[test]
fn what_was_forced_is_said() {
    let pages = pages(true, |r| {
        r.settings["recover"] = r.settings["seed"].clone();
    });
    for text in [&pages.html, &pages.markdown] {
        assert!(text.contains("Put side by side by force"));
        assert!(text.contains("recover = 0 and 1"), "{text}");
    }
}
