//! What an autoencoder costs by formula: floating-point operations, 2 per multiply-add.
//!
//! Counted are the convolutions, linear layers and attention of one image. Norms and activations are left out, and so are the
//! 1×1 convolutions around the latent: together they are below 1 %.

use super::config::VaeConfig;

impl VaeConfig {
    /// Operations of encoding one image of `side`×`side` pixels.
    pub fn encoder_flops(&self, side: usize) -> f64 {
        self.flops("encoder.", side)
    }

    /// Operations of decoding one image of `side`×`side` pixels.
    pub fn decoder_flops(&self, side: usize) -> f64 {
        self.flops("decoder.", side)
    }

    /// Of the parameters that begin with `coder`: a weight takes part once for every pixel of its layer's output.
    fn flops(&self, coder: &str, side: usize) -> f64 {
        let latent = side / self.factor();
        let stage = |name: &str| {
            let mut parts = name.split('.').skip(2);
            parts
                .next()
                .and_then(|i| i.parse::<u32>().ok())
                .unwrap_or(0)
        };
        let mut sum = 0.0;
        for spec in self.params() {
            let name = &spec.name;
            if !name.starts_with(coder) || !name.ends_with(".weight") || spec.shape.len() == 1 {
                continue;
            }
            let at = match () {
                () if name.contains("downsamplers") => side >> (stage(name) + 1),
                () if name.contains("down_blocks") => side >> stage(name),
                () if name.contains("upsamplers") => latent << (stage(name) + 1),
                () if name.contains("up_blocks") => latent << stage(name),
                () if name.contains("encoder.conv_in") || name.contains("decoder.conv_out") => side,
                () => latent,
            };
            let pixels = (at * at) as f64;
            sum += 2.0 * pixels * spec.shape.iter().product::<usize>() as f64;
            if name.contains("to_q") {
                // Scores, and their product with v.
                sum += 4.0 * pixels * pixels * spec.shape[0] as f64;
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_encoder_is_counted_by_hand() {
        let config = VaeConfig {
            down_block_types: vec![super::super::DownBlock::Plain; 2],
            up_block_types: vec![super::super::UpBlock::Plain; 2],
            block_out_channels: vec![32, 64],
            latent_channels: 4,
            ..VaeConfig::default()
        };
        // 8×8 pixels, latents of 4×4; a weight of every 3×3 convolution is 9·in·out.
        let (large, small) = (64.0, 16.0);
        let conv = |i: f64, o: f64| 9.0 * i * o;
        let weights_at_8 = conv(3.0, 32.0) + 2.0 * conv(32.0, 32.0);
        // The stride, a block with its shortcut, the middle's two blocks and attention, the way out to mean and log-variance.
        let weights_at_4 = conv(32.0, 32.0)
            + conv(32.0, 64.0)
            + conv(64.0, 64.0)
            + 32.0 * 64.0
            + 4.0 * conv(64.0, 64.0)
            + 4.0 * 64.0 * 64.0
            + conv(64.0, 8.0);
        let attention = 4.0 * small * small * 64.0;
        let expected = 2.0 * (large * weights_at_8 + small * weights_at_4) + attention;
        assert_eq!(config.encoder_flops(8), expected);
        assert!(config.decoder_flops(8) > config.encoder_flops(8));
    }
}
