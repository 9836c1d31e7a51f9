//! Text for LaTeX, in ASCII alone: pdfLaTeX knows no Greek letters and few signs outside of math mode.

/// Escapes what LaTeX would take for a command, and writes every sign in ASCII. What has no name here shows its number.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => {
                out.push('\\');
                out.push(c);
            }
            '\\' => out.push_str("\\textbackslash{}"),
            '~' => out.push_str("\\textasciitilde{}"),
            '^' => out.push_str("\\textasciicircum{}"),
            // Other glyphs in the default encoding.
            '<' | '>' | '|' => out.push_str(&format!("${c}$")),
            // After the end of a row they would be its arguments.
            '[' | ']' | '*' => out.push_str(&format!("{{{c}}}")),
            '\u{a0}' | '\u{202f}' => out.push('~'),
            '–' => out.push_str("--"),
            '—' => out.push_str("---"),
            '‘' | '’' => out.push('\''),
            '“' | '”' => out.push_str("''"),
            '…' => out.push_str("\\dots{}"),
            ' '..='~' => out.push(c),
            c if c.is_control() => out.push(' '),
            c => match math(c) {
                Some(name) => out.push_str(&format!("${name}$")),
                None => out.push_str(&format!("(U+{:04X})", u32::from(c))),
            },
        }
    }
    out
}

/// The name of a sign in math mode.
fn math(c: char) -> Option<&'static str> {
    Some(match c {
        '±' => "\\pm",
        '×' => "\\times",
        '·' => "\\cdot",
        '−' => "-",
        '→' => "\\to",
        '≥' => "\\ge",
        '≤' => "\\le",
        '≠' => "\\ne",
        '≈' => "\\approx",
        '≡' => "\\equiv",
        '∞' => "\\infty",
        '√' => "\\surd",
        '°' => "^{\\circ}",
        '½' => "\\frac{1}{2}",
        '⅓' => "\\frac{1}{3}",
        '⅔' => "\\frac{2}{3}",
        '¼' => "\\frac{1}{4}",
        '¾' => "\\frac{3}{4}",
        '²' => "^2",
        '³' => "^3",
        'α' => "\\alpha",
        'β' => "\\beta",
        'γ' => "\\gamma",
        'δ' => "\\delta",
        'ε' => "\\varepsilon",
        'η' => "\\eta",
        'θ' => "\\theta",
        'λ' => "\\lambda",
        'μ' | 'µ' => "\\mu",
        'π' => "\\pi",
        'ρ' => "\\rho",
        'σ' => "\\sigma",
        'τ' => "\\tau",
        'φ' => "\\varphi",
        'ω' => "\\omega",
        'Δ' => "\\Delta",
        'Σ' => "\\Sigma",
        'Ω' => "\\Omega",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn what_comes_out_is_ascii_and_means_the_same() {
        for (text, expected) in [
            ("50 % & a_b", "50 \\% \\& a\\_b"),
            ("2σ ± 0.1", "2$\\sigma$ $\\pm$ 0.1"),
            (
                "β ≥ τ, −3 × 2 ≤ 1",
                "$\\beta$ $\\ge$ $\\tau$, $-$3 $\\times$ 2 $\\le$ 1",
            ),
            ("16→8 – [*]", "16$\\to$8 -- {[}{*}{]}"),
            ("D½, p < 1", "D$\\frac{1}{2}$, p $<$ 1"),
            ("∮\n", "(U+222E) "),
        ] {
            assert_eq!(escape(text), expected);
        }
        let every: String = ('\0'..'\u{3000}').collect();
        assert!(escape(&every).is_ascii());
    }
}
