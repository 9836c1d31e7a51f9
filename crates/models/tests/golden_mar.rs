//! Parity of every step of MAR with the official implementation (`mar.safetensors`): forward, losses, gradients, and whole
//! sampling runs with the recorded noise.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{DType, Device, Tensor};
use tinyfusion_core::{BlockStack, LatentBatch, Plan, StateDict, TokenDenoiser, TokenQuery, run};
use tinyfusion_diffusion::samplers::{DdpmConfig, ddpm};
use tinyfusion_diffusion::{
    CfgSchedule, Clip, DiffusionConfig, GaussianDiffusion, Guidance, GuidedChannels, MarDraw,
    MarObjective, MarRandomness, MarTraining, Noised, TokenSampling, TokenStart, patchify,
    sample_tokens, token_diffusion, unpatchify,
};
use tinyfusion_models::{Mar, MarConfig};
use tinyfusion_nn::{Scope, layers};
use tinyfusion_testing::{Golden, max_diff};

struct Fixture {
    golden: Golden,
    config: MarConfig,
    weights: StateDict,
}

fn fixture() -> Fixture {
    let golden = Golden::open("mar.safetensors");
    let config: MarConfig = serde_json::from_value(golden.config["model"].clone()).unwrap();
    let weights: StateDict = golden.strip("w.").into_iter().collect();
    weights
        .check(&config.params())
        .expect("the official keys are ours");
    Fixture {
        golden,
        config,
        weights,
    }
}

fn process(respacing: &str) -> GaussianDiffusion {
    GaussianDiffusion::new(DiffusionConfig {
        respacing: respacing.parse().unwrap(),
        ..token_diffusion()
    })
    .unwrap()
}

fn same_timesteps(golden: &Golden, key: &str, process: &GaussianDiffusion) {
    let map = &process.schedule().timestep_map;
    let map: Vec<u32> = map.iter().map(|t| *t as u32).collect();
    assert_eq!(map, golden.ids(key), "{key}");
}

impl Fixture {
    fn net(&self) -> Mar {
        Mar::new(&self.config, &self.weights).unwrap()
    }

    fn depth(&self) -> usize {
        self.config.encoder_depth + self.config.decoder_depth
    }

    fn objective(&self) -> MarObjective {
        let training = MarTraining {
            dropout: false,
            ..self.config.training()
        };
        MarObjective::new(process(""), training).unwrap()
    }

    fn batch(&self) -> LatentBatch {
        LatentBatch {
            x: self.golden.tensor("in.imgs"),
            y: Tensor::new(self.golden.ids("in.labels"), &Device::Cpu).unwrap(),
        }
    }

    fn orders(&self, key: &str) -> Vec<Vec<usize>> {
        let l = self.config.seq_len();
        let ids = self.golden.ids(key);
        ids.chunks_exact(l)
            .map(|order| order.iter().map(|&i| i as usize).collect())
            .collect()
    }

    /// The recorded draw of `train` or `eval`.
    fn draw(&self, mode: &str) -> MarDraw {
        let g = &self.golden;
        let (b, l, k) = (
            g.size("batch"),
            self.config.seq_len(),
            self.config.diffusion_batch_mul,
        );
        let dropped: Vec<bool> = match g.get(&format!("{mode}.drop_u")) {
            None => vec![false; b],
            Some(u) => {
                let u = u.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
                let dropped: Vec<bool> =
                    u.iter().map(|u| *u < self.config.label_drop_prob).collect();
                let recorded = g.ids(&format!("{mode}.drop_mask"));
                assert!(recorded.iter().map(|d| *d == 1).eq(dropped.iter().copied()));
                dropped
            }
        };
        let random = MarRandomness {
            orders: self.orders(&format!("{mode}.orders")),
            mask_rate: g.table(&format!("{mode}.mask_rate"))[0],
            dropped,
            t: g.ids(&format!("{mode}.diff.t")),
            noise: g
                .tensor(&format!("{mode}.diff.noise"))
                .reshape((k, b, l, self.config.token_embed_dim()))
                .unwrap(),
            dropout: None,
        };
        self.objective().draw_at(&self.batch(), &random).unwrap()
    }

    fn norm(&self, name: &str, width: usize, x: &Tensor) -> Tensor {
        let root = Scope::new(&self.weights, 0.0);
        let norm = layers::LayerNorm::load(&root.at(name), width, self.golden.number("norm_eps"));
        norm.unwrap().forward(x).unwrap()
    }
}

#[test]
fn golden_mar_schedules() {
    let f = fixture();
    for (name, respacing) in [("train", ""), ("gen", f.config.num_sampling_steps.as_str())] {
        let process = process(respacing);
        let s = process.schedule();
        let key = |table: &str| format!("sched.{name}.{table}");
        f.golden.close_table(&key("betas"), &s.betas);
        f.golden
            .close_table(&key("alphas_cumprod"), &s.alphas_cumprod);
        same_timesteps(&f.golden, &key("timestep_map"), &process);
    }
}

#[test]
fn golden_mar_tokens() {
    let f = fixture();
    let imgs = f.golden.tensor("in.imgs");
    let tokens = patchify(&imgs, f.config.patch_size).unwrap();
    f.golden.close_within("in.patchified", &tokens, 0.0);
    let back = unpatchify(&tokens, f.config.patch_size).unwrap();
    f.golden.close_within("in.imgs", &back, 0.0);
}

#[test]
fn golden_mar_blocks_and_conditions() {
    let f = fixture();
    let net = f.net();
    for mode in ["train", "eval"] {
        let key = |name: &str| format!("{mode}.{name}");
        let query = f.draw(mode).query;
        f.golden.close_within(&key("mask"), &query.mask, 0.0);
        // Embedded are the visible tokens only; all of them when none is hidden.
        let everything = TokenQuery {
            mask: query.mask.zeros_like().unwrap(),
            ..query.clone()
        };
        f.golden
            .close(&key("enc.embedded"), &net.embed(&everything).unwrap().0);
        let all: Vec<usize> = (0..f.depth()).collect();
        let trace = run(&net, &query, &Plan::full(f.depth()).with_taps(all)).unwrap();
        let (encoder, decoder) = trace.taps.split_at(f.config.encoder_depth);
        for (stage, taps) in [("enc", encoder), ("dec", decoder)] {
            for (i, tap) in taps.iter().enumerate() {
                f.golden.close(&key(&format!("{stage}.{i}")), tap);
            }
        }
        let (last, cond) = (encoder.last().unwrap(), net.embed(&query).unwrap().1);
        let normed = f.norm("encoder_norm", f.config.encoder_embed_dim, last);
        f.golden.close(&key("enc.norm"), &normed);
        f.golden
            .close(&key("dec.embedded"), &net.bridge(1, last, &cond).unwrap());
        let last = decoder.last().unwrap();
        let normed = f.norm("decoder_norm", f.config.decoder_embed_dim, last);
        f.golden.close(&key("dec.norm"), &normed);
        f.golden.close(&key("z"), &trace.output);
    }
}

#[test]
fn golden_mar_denoiser_on_every_token() {
    let f = fixture();
    let (net, process, k) = (f.net(), process(""), f.config.diffusion_batch_mul);
    let tokens = patchify(&f.golden.tensor("in.imgs"), f.config.patch_size).unwrap();
    for mode in ["train", "eval"] {
        let key = |name: &str| format!("{mode}.{name}");
        let (t, noise) = (
            f.golden.ids(&key("diff.t")),
            f.golden.tensor(&key("diff.noise")),
        );
        let x_start = tokens.flatten_to(1).unwrap().repeat((k, 1)).unwrap();
        let x_t = process.q_sample(&x_start, &t, &noise).unwrap();
        f.golden.close(&key("net.x"), &x_t);
        let z = f.golden.tensor(&key("z")).flatten_to(1).unwrap();
        let z = z.repeat((k, 1)).unwrap();
        let times = process.model_timesteps(&t, &Device::Cpu).unwrap();
        let out = net.denoise_tokens(&x_t, &times, &z).unwrap();
        f.golden.close(&key("net.out"), &out);
        let noised = Noised {
            x_start: &x_start,
            noise: &noise,
            x_t: &x_t,
            t: &t,
        };
        let losses = process.losses(&out, &noised).unwrap();
        f.golden.close(&key("diff.mse"), &losses.mse.unwrap());
        f.golden.close(&key("diff.vb"), &losses.vb.unwrap());
        f.golden.close(&key("diff.loss"), &losses.loss);
    }
}

#[test]
fn golden_mar_loss_and_gradients() {
    let f = fixture();
    let objective = f.objective();
    for mode in ["train", "eval"] {
        let draw = f.draw(mode);
        let mut weights = f.weights.clone();
        let vars = weights.make_trainable(|_| true).unwrap();
        let net = Mar::new(&f.config, &weights).unwrap();
        let z = run(&net, &draw.query, &Plan::full(f.depth()))
            .unwrap()
            .output;
        let prediction = objective.prediction(&net, &z, &draw).unwrap();
        let loss = objective.losses(&prediction, &draw).unwrap();
        let loss = loss.mean_all().unwrap();
        f.golden.close(&format!("{mode}.loss"), &loss);
        let gradients = loss.backward().unwrap();
        let prefix = format!("{mode}.grad.");
        let recorded = f.golden.names(&prefix);
        assert!(!recorded.is_empty());
        for key in recorded {
            let name = &key[prefix.len()..];
            let var = &vars.iter().find(|(n, _)| n == name).unwrap().1;
            f.golden.close(&key, gradients.get(var).unwrap());
        }
    }
}

/// The first rows of a recorded tensor, as many as `got` has: with guidance the reference records the unconditional half
/// too, of which nothing is used.
fn close_rows(golden: &Golden, key: &str, got: &Tensor) {
    let want = golden.tensor(key);
    let want = want.narrow(0, 0, got.dim(0).unwrap()).unwrap();
    assert_eq!(want.dims(), got.dims(), "{key}");
    let diff = max_diff(got, &want);
    assert!(diff <= golden.tolerance(key), "{key}: off by {diff:e}");
}

#[test]
fn golden_mar_sampling() {
    let f = fixture();
    let (net, g) = (f.net(), &f.golden);
    let y = Tensor::new(g.ids("sample.labels"), &Device::Cpu).unwrap();
    let infos = g.config["sample_info"].as_array().unwrap();
    assert!(!infos.is_empty());
    for (entry, info) in infos.iter().enumerate() {
        let number = |name: &str| info[name].as_f64().unwrap();
        let key = |name: &str| format!("sample.{entry}.{name}");
        let process = process(info["respacing"].as_str().unwrap());
        same_timesteps(g, &key("timestep_map"), &process);
        let config = TokenSampling {
            num_iter: number("num_iter") as usize,
            cfg: number("cfg"),
            cfg_schedule: serde_json::from_value::<CfgSchedule>(info["schedule"].clone()).unwrap(),
            temperature: number("temperature"),
        };
        let start = TokenStart {
            y: y.clone(),
            fake: f.config.class_num as u32,
            orders: f.orders(&key("orders")),
            channels: f.config.token_embed_dim(),
        };
        let steps = process.num_timesteps();
        let mut seen = 0;
        let tokens = sample_tokens(
            &net,
            &process,
            &config,
            &start,
            |request| {
                let at = |name: &str| key(&format!("step.{}.{name}", request.iteration));
                let noise = match request.index {
                    None => g.tensor(&at("init_noise")),
                    Some(index) => g.tensor(&at("noise")).get(steps - 1 - index)?,
                };
                Ok(noise.narrow(0, 0, request.tokens.rows.len())?)
            },
            |_| Ok(()),
            |step| {
                let s = step.done - 1;
                let at = |name: &str| key(&format!("step.{s}.{name}"));
                let mask = g.tensor(&at("mask")).to_dtype(DType::F32)?;
                assert_eq!(max_diff(&mask, step.mask), 0.0, "{}", at("mask"));
                g.close(&at("z"), step.z);
                close_rows(g, &at("latent"), step.latents);
                let info = &info["steps"][s];
                assert_eq!(step.guidance, info["cfg_iter"].as_f64().unwrap());
                assert_eq!(step.z.dim(0)?, info["n_z"].as_u64().unwrap() as usize);
                seen += 1;
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(seen, config.num_iter);
        let image = unpatchify(&tokens, f.config.patch_size).unwrap();
        g.close(&key("tokens"), &image);
    }
}

#[test]
fn golden_mar_diffusion_loss_alone() {
    let f = fixture();
    let (net, g) = (f.net(), &f.golden);
    let process = process(g.text("diffloss_respacing"));
    same_timesteps(g, "dl.timestep_map", &process);
    let (x, z, t) = (
        g.tensor("dl.step.x"),
        g.tensor("dl.step.z"),
        g.ids("dl.step.t"),
    );
    let scale = 1.7; // the README's
    let guidance = Guidance {
        scale,
        channels: GuidedChannels::All,
    };
    let ask = |x: &Tensor, t: &Tensor| net.denoise_tokens(x, t, &z);
    let times = process.model_timesteps(&t, &Device::Cpu).unwrap();
    let out = ask(&x, &times).unwrap();
    g.close("dl.net.out", &out);
    let guided = guidance.guide_doubled(&x, &times, ask).unwrap();
    g.close("dl.net.out_cfg", &guided);

    let temperatures = g.config["diffloss_temps"].as_array().unwrap();
    for (j, temperature) in temperatures.iter().enumerate() {
        let temperature = temperature.as_f64().unwrap();
        let noise = (g.tensor("dl.step.noise") * temperature).unwrap();
        let step = process
            .p_sample(&out, &x, &t, Clip::Off, Some(&noise))
            .unwrap();
        g.close(&format!("dl.step.temp{j}.sample"), &step.sample);
        g.close(&format!("dl.step.temp{j}.pred_xstart"), &step.pred_xstart);
        for kind in ["nocfg", "cfg"] {
            let key = |name: &str| format!("dl.sample.{kind}.{name}");
            let (start, noise) = (g.tensor(&key("init_noise")), g.tensor(&key("noise")));
            let steps = process.num_timesteps();
            let start = match kind {
                "cfg" => Tensor::cat(&[&start, &start], 0).unwrap(), // one noise for both halves
                _ => start,
            };
            let sampled = ddpm(
                &process,
                DdpmConfig::default(),
                &start,
                |x, t| match kind {
                    "cfg" => guidance.guide_doubled(x, t, ask),
                    _ => ask(x, t),
                },
                |index| Ok((noise.get(steps - 1 - index)? * temperature)?),
                |_| Ok(()),
            )
            .unwrap();
            g.close(&key(&format!("temp{j}")), &sampled);
        }
    }
}
