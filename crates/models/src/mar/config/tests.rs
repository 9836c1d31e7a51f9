use super::*;

#[test]
fn parameter_counts_are_the_published_ones() {
    // Millions, as printed in the MAR and TinyFusion papers.
    let published = [208.0, 479.0, 943.0, 277.0];
    for (preset, millions) in MarConfig::presets().iter().zip(published) {
        preset.config.validate().unwrap();
        let found = MarConfig::preset(&preset.name.to_lowercase()).unwrap();
        assert_eq!(found, preset.config);
        let found = preset.config.parameters() as f64 / 1e6;
        assert!(
            (found - millions).abs() < 1.0,
            "{}: {found} M, published {millions} M",
            preset.name
        );
    }
}
