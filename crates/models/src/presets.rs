use tinyfusion_core::{Error, Result};

use crate::DiTConfig;

/// A published size.
#[derive(Debug, Clone)]
pub struct Preset {
    /// Its name, for example `DiT-XL/2`.
    pub name: String,
    /// Its sizes, on 256×256 ImageNet latents (32×32×4).
    pub config: DiTConfig,
}

/// (name, width, depth, heads): Peebles & Xie 2023, table 1.
const SIZES: [(&str, usize, usize, usize); 4] = [
    ("S", 384, 12, 6),
    ("B", 768, 12, 12),
    ("L", 1024, 24, 16),
    ("XL", 1152, 28, 16),
];

/// Depths cut from DiT-XL/2: TinyFusion, table 1.
const SHALLOW: [usize; 3] = [19, 14, 7];

/// Every preset, largest patch last within a size.
pub fn presets() -> Vec<Preset> {
    let mut all = Vec::new();
    for (size, hidden_size, depth, num_heads) in SIZES {
        for patch_size in [2, 4, 8] {
            let config = DiTConfig {
                patch_size,
                hidden_size,
                depth,
                num_heads,
                ..DiTConfig::default()
            };
            all.push(Preset {
                name: format!("DiT-{size}/{patch_size}"),
                config,
            });
        }
    }
    for depth in SHALLOW {
        all.push(Preset {
            name: format!("DiT-D{depth}/2"),
            config: DiTConfig::default().with_depth(depth),
        });
    }
    all
}

/// The preset called `name` (case does not matter).
pub fn preset(name: &str) -> Result<DiTConfig> {
    let all = presets();
    match all.iter().find(|p| p.name.eq_ignore_ascii_case(name)) {
        Some(p) => Ok(p.config.clone()),
        None => {
            let names: Vec<&str> = all.iter().map(|p| p.name.as_str()).collect();
            Err(Error::usage(format!(
                "no model is called `{name}`; there are {}",
                names.join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_are_the_published_ones() {
        // Millions, as printed in the DiT and TinyFusion papers.
        for (name, millions) in [
            ("DiT-S/2", 33),
            ("DiT-B/2", 130),
            ("DiT-L/2", 458),
            ("DiT-XL/2", 675),
            ("DiT-D19/2", 459),
            ("DiT-D14/2", 340),
            ("DiT-D7/2", 173),
        ] {
            let config = preset(name).unwrap();
            config.validate().unwrap();
            let found = config.parameters() as f64 / 1e6;
            assert!(
                (found - f64::from(millions)).abs() < 1.0,
                "{name}: {found} M, published {millions} M"
            );
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = preset("DiT-XXL/2").unwrap_err().to_string();
        assert!(
            error.contains("DiT-XL/2") && error.contains("DiT-D14/2"),
            "{error}"
        );
    }
}
