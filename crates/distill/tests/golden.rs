//! Masks, feature losses, the whole loss and its gradients against the recorded reference.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{Tensor, Var};
use tinyfusion_core::{BlockLayout, BlockStack, LatentBatch, LatentQuery, Result};
use tinyfusion_diffusion::{
    DenoisingDraw, DenoisingObjective, DiffusionConfig, GaussianDiffusion, LabelDrop, LossKind,
    Respacing, Variance,
};
use tinyfusion_distill::{
    FeatureLoss, KnowledgeConfig, LayerMap, Teacher, feature_loss, inliers, losses,
};
use tinyfusion_testing::Golden;

const FILE: &str = "kd_losses.safetensors";

/// A network with recorded hidden states and output, whatever it is asked.
struct Recorded {
    layout: BlockLayout,
    features: Vec<Tensor>,
    output: Tensor,
}

impl Recorded {
    fn new(features: Vec<Tensor>, output: Tensor) -> Self {
        Self {
            layout: BlockLayout::single(features.len()),
            features,
            output,
        }
    }
}

impl BlockStack for Recorded {
    type Input = LatentQuery;
    type Cond = Tensor;
    fn layout(&self) -> &BlockLayout {
        &self.layout
    }
    fn embed(&self, q: &LatentQuery) -> Result<(Tensor, Tensor)> {
        Ok((q.x.clone(), q.t.clone()))
    }
    fn block(&self, i: usize, _h: &Tensor, _c: &Tensor) -> Result<Tensor> {
        Ok(self.features[i].clone())
    }
    fn head(&self, _h: &Tensor, _c: &Tensor) -> Result<Tensor> {
        Ok(self.output.clone())
    }
}

fn layers(g: &Golden, who: &str) -> Vec<usize> {
    let list = g.config[format!("{who}_layers")].as_array().unwrap();
    list.iter().map(|v| v.as_u64().unwrap() as usize).collect()
}

fn features(g: &Golden, who: &str) -> Vec<Tensor> {
    (0..g.size(&format!("{who}_depth")))
        .map(|i| g.tensor(&format!("in.{who}_feat.{i}")))
        .collect()
}

#[test]
fn golden_masks_and_statistics() {
    let g = Golden::open(FILE);
    let k = KnowledgeConfig::default().sigma;
    for who in ["student", "teacher"] {
        for layer in layers(&g, who) {
            let found = inliers(&g.tensor(&format!("in.{who}_feat.{layer}")), k).unwrap();
            g.close(&format!("mean.{who}.{layer}"), &found.mean);
            g.close(&format!("var.{who}.{layer}"), &found.variance);
            g.close_within(&format!("mask.{who}.{layer}"), &found.mask, 0.0);
        }
    }
}

#[test]
fn golden_feature_loss_of_each_pair() {
    let g = Golden::open(FILE);
    let k = KnowledgeConfig::default().sigma;
    let (student, teacher) = (layers(&g, "student"), layers(&g, "teacher"));
    assert!(!student.is_empty() && student.len() == teacher.len());
    for (s, t) in student.iter().zip(&teacher) {
        let of = |who: &str, i: &usize| g.tensor(&format!("in.{who}_feat.{i}"));
        let loss =
            feature_loss(&of("student", s), &of("teacher", t), FeatureLoss::Masked, k).unwrap();
        g.close(&format!("pair_feat_loss.{s}"), &loss);
    }
}

fn objective(g: &Golden, chain: &str, variant: &str) -> DenoisingObjective {
    let respacing: Respacing = match chain {
        "spaced" => g.config["spaced_respacing"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap(),
        _ => "".parse().unwrap(),
    };
    let base = DiffusionConfig {
        respacing,
        ..DiffusionConfig::default()
    };
    let config = match variant {
        "learned" => base,
        "rescaled" => DiffusionConfig {
            loss: LossKind::RescaledMse,
            ..base
        },
        "fixed" => DiffusionConfig {
            variance: Variance::FixedLarge,
            ..base
        },
        other => panic!("unknown variant {other}"),
    };
    let classes = g.ids("in.y").into_iter().max().unwrap() + 1;
    let labels = LabelDrop {
        num_classes: classes,
        probability: 0.0,
    };
    DenoisingObjective::new(GaussianDiffusion::new(config).unwrap(), labels).unwrap()
}

fn draw(g: &Golden, chain: &str, objective: &DenoisingObjective) -> DenoisingDraw {
    let x = g.tensor("in.x_start");
    let y = Tensor::new(g.ids("in.y"), x.device()).unwrap();
    objective
        .draw_at(
            &LatentBatch { x, y },
            g.ids(&format!("in.t_{chain}")),
            g.tensor("in.noise"),
        )
        .unwrap()
}

/// (chain, function, variant) of every recorded loss.
fn cases(g: &Golden) -> Vec<(String, String, String)> {
    let mut cases: Vec<_> = ["full.", "spaced."]
        .iter()
        .flat_map(|chain| g.names(chain))
        .filter(|name| name.ends_with(".loss"))
        .map(|name| {
            let parts: Vec<&str> = name.split('.').collect();
            assert_eq!(parts.len(), 4, "{name}");
            (
                parts[0].to_string(),
                parts[1].to_string(),
                parts[2].to_string(),
            )
        })
        .collect();
    cases.dedup();
    assert!(
        cases.iter().any(|c| c.1 == "kd") && cases.iter().any(|c| c.1 == "kd_rep"),
        "the file holds no losses"
    );
    cases
}

#[test]
fn golden_losses_and_gradients() {
    let g = Golden::open(FILE);
    let channels = g.tensor("in.x_start").dim(1).unwrap();
    for (chain, function, variant) in cases(&g) {
        let prefix = format!("{chain}.{function}.{variant}");
        let objective = objective(&g, &chain, &variant);
        let draw = draw(&g, &chain, &objective);
        // With a fixed variance the stub puts out the estimate alone.
        let output = |who: &str| {
            let all = g.tensor(&format!("in.{who}_output"));
            let kept = objective.diffusion().output_channels(channels);
            all.narrow(1, 0, kept).unwrap().contiguous().unwrap()
        };
        let feature_vars: Vec<Var> = features(&g, "student")
            .iter()
            .map(|f| Var::from_tensor(f).unwrap())
            .collect();
        let output_var = Var::from_tensor(&output("student")).unwrap();
        let student = Recorded::new(
            feature_vars.iter().map(|v| v.as_tensor().clone()).collect(),
            output_var.as_tensor().clone(),
        );
        let teacher_net = Recorded::new(features(&g, "teacher"), output("teacher"));
        let pairs = layers(&g, "student")
            .into_iter()
            .zip(layers(&g, "teacher"))
            .collect();
        let layers_map =
            LayerMap::new(g.size("student_depth"), g.size("teacher_depth"), pairs).unwrap();
        let teacher = Teacher {
            net: &teacher_net,
            layers: Some(layers_map),
        };
        let with_features = function == "kd_rep";
        let knowledge = KnowledgeConfig {
            alpha_kd: g.number("alpha_kd"),
            beta: g.number("beta_feat"),
            features: if with_features {
                FeatureLoss::Masked
            } else {
                FeatureLoss::None
            },
            ..KnowledgeConfig::default()
        };

        let parts = losses(&objective, &student, Some((&teacher, &knowledge)), &draw).unwrap();
        g.close(&format!("{prefix}.gt"), &parts.diff);
        g.close(&format!("{prefix}.kd_loss"), parts.kd.as_ref().unwrap());
        assert_eq!(parts.rep.is_some(), with_features);
        if let Some(rep) = &parts.rep {
            g.close(&format!("{prefix}.feat_loss"), rep);
        }
        let total = parts.total(knowledge.alpha_kd, knowledge.beta).unwrap();
        g.close(&format!("{prefix}.loss"), &total);

        let grads = total.mean_all().unwrap().backward().unwrap();
        g.close(
            &format!("{prefix}.grad.student_output"),
            grads.get(output_var.as_tensor()).unwrap(),
        );
        let recorded = g.names(&format!("{prefix}.grad.student_feat."));
        assert_eq!(
            recorded.len(),
            if with_features {
                layers(&g, "student").len()
            } else {
                0
            },
            "{prefix}"
        );
        for (i, var) in feature_vars.iter().enumerate() {
            let key = format!("{prefix}.grad.student_feat.{i}");
            match grads.get(var.as_tensor()) {
                Some(grad) => g.close(&key, grad),
                None => assert!(g.get(&key).is_none(), "no gradient for {key}"),
            }
        }
    }
}
