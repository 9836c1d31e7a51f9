use candle_core::{DType, Device, Result, Tensor};
use tinyfusion_core::{Part, Parts};

use super::training::{adamw, blocks, clipping};
use super::{Check, Wanted, agree, random};
use crate::ops;

/// Every check, in f32 and in bf16.
pub fn checks() -> Vec<Check> {
    let mut list = List(Vec::new());
    attention(&mut list);
    norms(&mut list);
    elementwise(&mut list);
    linear(&mut list);
    blend(&mut list);
    inference(&mut list);
    list.0.extend(mixed());
    list.0.extend([DType::F32, DType::BF16].map(blocks));
    list.0.extend([clipping(), adamw()]);
    list.0
}

struct List(Vec<Check>);

impl List {
    /// `f` of operands of these shapes, in both types, with all gradients.
    fn add<F>(&mut self, name: &str, shapes: &[&[usize]], f: F)
    where
        F: Fn(&[Tensor]) -> Result<Tensor> + Clone + Send + Sync + 'static,
    {
        self.push(name, shapes, Wanted::Gradients, &f);
    }

    /// The same of an operation that is for inference.
    fn add_inference<F>(&mut self, name: &str, shapes: &[&[usize]], f: F)
    where
        F: Fn(&[Tensor]) -> Result<Tensor> + Clone + Send + Sync + 'static,
    {
        self.push(name, shapes, Wanted::Output, &f);
    }

    fn push<F>(&mut self, name: &str, shapes: &[&[usize]], wanted: Wanted, f: &F)
    where
        F: Fn(&[Tensor]) -> Result<Tensor> + Clone + Send + Sync + 'static,
    {
        let shapes: Vec<Vec<usize>> = shapes.iter().map(|shape| shape.to_vec()).collect();
        for dtype in [DType::F32, DType::BF16] {
            let (shapes, f) = (shapes.clone(), f.clone());
            self.0.push(Check {
                name: name.to_string(),
                dtype,
                run: Box::new(move |device| {
                    let types = vec![dtype; shapes.len()];
                    agree(device, &shapes, (dtype, &types), wanted, &f)
                }),
            });
        }
    }
}

fn dropout_of(samples: usize) -> Result<ops::Dropout> {
    let seeds: Vec<u64> = (0..samples as u64).map(|b| b * 77 + 5).collect();
    ops::Dropout::new(0.3, &seeds, 3)
}

/// Head sizes of every kernel, also such as fill none or are not aligned; tokens below, at and above a tile.
fn attention(list: &mut List) {
    for e in [32, 64, 72, 80, 128] {
        for (b, t, heads) in [(2, 1, 2), (1, 17, 3), (2, 64, 1), (1, 256, 1)] {
            let name = format!("attention B{b} T{t} H{heads} E{e}");
            list.add(&name, &[&[b, t, 3 * heads * e]], move |x| {
                ops::attention(&x[0], heads)
            });
        }
    }
    for (b, t, heads, e) in [(2, 100, 2, 5), (1, 70, 3, 20), (1, 33, 1, 130)] {
        let name = format!("attention B{b} T{t} H{heads} E{e}");
        list.add(&name, &[&[b, t, 3 * heads * e]], move |x| {
            ops::attention(&x[0], heads)
        });
    }
    // Scores so far apart that running maxima move.
    list.add(
        "attention B1 T150 H1 E64, wide scores",
        &[&[1, 150, 3 * 64]],
        |x| ops::attention(&(&x[0] * 4.0)?, 1),
    );
    for (b, t, heads, e) in [(2, 33, 2, 24), (1, 90, 2, 72), (1, 150, 1, 128)] {
        let name = format!("attention B{b} T{t} H{heads} E{e}, dropped");
        list.add(&name, &[&[b, t, 3 * heads * e]], move |x| {
            ops::attention_dropped(&x[0], heads, &dropout_of(b)?)
        });
    }
}

fn norms(list: &mut List) {
    for (b, t, d) in [
        (1, 1, 8),
        (3, 5, 17),
        (2, 64, 64),
        (2, 9, 1152),
        (2, 300, 40),
    ] {
        let sizes = format!("B{b} T{t} D{d}");
        list.add(
            &format!("layer norm, modulated {sizes}"),
            &[&[b, t, d], &[b, 6 * d]],
            |x| ops::layer_norm_modulate(&x[0], &x[1], 3, 4, 1e-6),
        );
        list.add(
            &format!("layer norm {sizes}"),
            &[&[b, t, d], &[d], &[d]],
            |x| ops::layer_norm(&x[0], &x[1], &x[2], 1e-6),
        );
        list.add(
            &format!("gated residual {sizes}"),
            &[&[b, t, d], &[b, t, d], &[b, 6 * d]],
            |x| ops::gated_residual(&x[0], &x[1], &x[2], 5),
        );
    }
    for (n, d) in [(1, 8), (5, 17), (300, 64), (3, 1152)] {
        list.add(
            &format!("modulate N{n} D{d}"),
            &[&[n, d], &[n, 3 * d]],
            |x| ops::modulate(&x[0], &x[1], 2, 0),
        );
    }
}

/// Of five samples three are kept; samples of few values, of a number that is no multiple of 4 or 8, and of more than one
/// block of threads adds up.
fn blend(list: &mut List) {
    for (t, d) in [(1, 3), (5, 17), (9, 8), (70, 256)] {
        let (all, kept): (&[usize], &[usize]) = (&[5, t, d], &[3, t, d]);
        list.add(&format!("pick B5 R3 T{t} D{d}"), &[all], |x| {
            ops::pick(&x[0], &index(&[4, 0, 3], &x[0])?).map_err(candle_core::Error::wrap)
        });
        let name = format!("join B5 R3 T{t} D{d}");
        list.add(&name, &[all, kept, &[5, 1, 1]], move |x| {
            let (h, like) = (&x[0], |t: Tensor| {
                t.to_device(x[0].device())?.to_dtype(x[0].dtype())
            });
            let past = like(random(&[2, t, d], 7)?.to_dtype(DType::BF16)?)?;
            let (kept, dropped) = (index(&[4, 0, 3], h)?, index(&[1, 2], h)?);
            // Ones and zeros with the gradient of a variable.
            let of = like(Tensor::new(&[1f32, 0.0, 0.0, 1.0, 1.0], &Device::Cpu)?)?;
            let mask = ((&x[2] - x[2].detach())? + of.reshape((5, 1, 1))?)?;
            ops::join(&Parts {
                h,
                mask: &mask,
                kept: Part {
                    index: &kept,
                    before: &h.index_select(&kept, 0)?,
                    after: &x[1],
                },
                dropped: Part {
                    index: &dropped,
                    before: &h.index_select(&dropped, 0)?,
                    after: &past,
                },
                place: &index(&[1, 3, 4, 2, 0], h)?,
            })
            .map_err(candle_core::Error::wrap)
        });
    }
}

fn index(samples: &[u32], of: &Tensor) -> Result<Tensor> {
    Tensor::new(samples, of.device())
}

fn elementwise(list: &mut List) {
    list.add("GELU-tanh", &[&[3000]], |x| ops::gelu_tanh(&(&x[0] * 3.0)?));
    list.add("GELU-erf", &[&[3000]], |x| ops::gelu_erf(&(&x[0] * 3.0)?));
    list.add("residual B2 T9 D40", &[&[2, 9, 40], &[2, 9, 40]], |x| {
        ops::residual(&x[0], &x[1])
    });
    list.add("SiLU", &[&[7, 33]], |x| ops::silu(&(&x[0] * 3.0)?));
    list.add("dropout B3 5·17", &[&[3, 5, 17]], |x| {
        ops::dropout(&x[0], &dropout_of(3)?)
    });
}

/// In bf16 those of multiples of 8 are cublasLt's.
fn linear(list: &mut List) {
    for (rows, i, o) in [
        (1, 1, 1),
        (5, 17, 33),
        (1, 16, 8),
        (130, 64, 192),
        (3, 1152, 72),
    ] {
        let sizes = format!("R{rows} I{i} O{o}");
        list.add(
            &format!("linear {sizes}"),
            &[&[rows, i], &[o, i], &[o]],
            |x| ops::linear(&x[0], &x[1], Some(&x[2])),
        );
        list.add(
            &format!("linear without bias {sizes}"),
            &[&[2, rows, i], &[o, i]],
            |x| ops::linear(&x[0], &x[1], None),
        );
        list.add(
            &format!("linear, GELU-tanh {sizes}"),
            &[&[rows, i], &[o, i], &[o]],
            |x| ops::linear_gelu(&x[0], &x[1], &x[2]),
        );
        list.add(
            &format!("linear, GELU-erf {sizes}"),
            &[&[rows, i], &[o, i], &[o]],
            |x| ops::linear_gelu_erf(&x[0], &x[1], &x[2]),
        );
        let shapes: [&[usize]; 3] = [&[rows, i], &[o, i], &[o]];
        list.add_inference(
            &format!("linear, GELU-tanh without backward {sizes}"),
            &shapes,
            |x| ops::linear_gelu(&x[0].detach(), &x[1].detach(), &x[2].detach()),
        );
        list.add_inference(
            &format!("linear, GELU-erf without backward {sizes}"),
            &shapes,
            |x| ops::linear_gelu_erf(&x[0].detach(), &x[1].detach(), &x[2].detach()),
        );
    }
    // Operands that begin 8 and 16 bytes into their storage.
    for start in [4, 8] {
        let (rows, i, o) = (6, 24, 40);
        list.add(
            &format!("linear, GELU-tanh R{rows} I{i} O{o}, from {start}"),
            &[&[start + rows * i], &[o, i], &[start + o]],
            move |x| {
                let part = x[0].narrow(0, start, rows * i)?.reshape((rows, i))?;
                ops::linear_gelu(&part, &x[1], &x[2].narrow(0, start, o)?)
            },
        );
    }
    list.add(
        "low-rank linear, GELU-tanh R18 I24 O40 r3",
        &[&[2, 9, 24], &[3, 24], &[40, 3]],
        low_rank,
    );
}

/// An update of a layer (24, 40), whose weight and bias are frozen under it.
fn low_rank(x: &[Tensor]) -> Result<Tensor> {
    let frozen = |shape: &[usize], seed| {
        random(shape, seed)?
            .to_dtype(DType::BF16)?
            .to_device(x[0].device())?
            .to_dtype(x[0].dtype())
    };
    let update = ops::LowRank {
        a: x[1].clone(),
        b: x[2].clone(),
        scale: 0.7,
    };
    ops::linear_low_rank_gelu(&x[0], &frozen(&[40, 24], 7)?, &frozen(&[40], 8)?, &update)
}

/// What an autoencoder needs, made of candle's operations.
fn inference(list: &mut List) {
    for (stride, before, after, upsample) in [(1, 1, 1, 1), (2, 0, 1, 1), (1, 1, 1, 2)] {
        let conv = ops::Conv2d {
            stride,
            before,
            after,
            upsample,
        };
        list.add_inference(
            &format!("conv2d B2 C6 O5 9×8, {conv:?}"),
            &[&[2, 6, 9, 8], &[5, 6, 3, 3], &[5]],
            move |x| ops::conv2d(&x[0], &x[1], &x[2], conv),
        );
    }
    list.add_inference(
        "group norm, SiLU B2 C12 7×5",
        &[&[2, 12, 7, 5], &[12], &[12]],
        |x| ops::group_norm_silu(&x[0], &x[1], &x[2], 3, 1e-6),
    );
}

/// bf16 beside f32: activations on parameters, and what a residual stream is read by and added to. Gradients have the types of
/// their operands.
fn mixed() -> Vec<Check> {
    const F: DType = DType::F32;
    const B: DType = DType::BF16;
    let check = |name: &str, operands: &[(&[usize], DType)], f: fn(&[Tensor]) -> Result<Tensor>| {
        let (shapes, types): (Vec<Vec<usize>>, Vec<DType>) = operands
            .iter()
            .map(|(shape, dtype)| (shape.to_vec(), *dtype))
            .unzip();
        Check {
            name: name.to_string(),
            dtype: B,
            run: Box::new(move |device| agree(device, &shapes, (B, &types), Wanted::Gradients, &f)),
        }
    };
    let mut checks = vec![
        check(
            "linear, GELU-tanh R20 I24 O40, f32 parameters",
            &[(&[20, 24], B), (&[40, 24], F), (&[40], F)],
            |x| ops::linear_gelu(&x[0], &x[1], &x[2]),
        ),
        check(
            "low-rank linear R18 I24 O40 r3, f32 parameters",
            &[(&[2, 9, 24], B), (&[3, 24], F), (&[40, 3], F)],
            low_rank,
        ),
        check(
            "layer norm R20 D24, f32 parameters",
            &[(&[20, 24], B), (&[24], F), (&[24], F)],
            |x| ops::layer_norm(&x[0], &x[1], &x[2], 1e-6),
        ),
    ];
    for (b, t, d) in [(3, 5, 17), (2, 9, 1152), (2, 300, 40)] {
        let sizes = format!("B{b} T{t} D{d}, f32 stream");
        let (stream, beside, packed) = (&[b, t, d][..], &[b, t, d][..], &[b, 6 * d][..]);
        checks.extend([
            check(
                &format!("layer norm, modulated {sizes}"),
                &[(stream, F), (packed, B)],
                |x| ops::layer_norm_modulate(&x[0], &x[1], 3, 4, 1e-6),
            ),
            check(
                &format!("layer norm {sizes}"),
                &[(stream, F), (&[d], F), (&[d], F)],
                |x| {
                    // Only a GPU rounds: the other side computes in f64.
                    let dtype = if x[0].dtype() == F { B } else { x[0].dtype() };
                    ops::layer_norm_in(&x[0], &x[1], &x[2], 1e-6, dtype)
                },
            ),
            check(
                &format!("gated residual {sizes}"),
                &[(stream, F), (beside, B), (packed, B)],
                |x| ops::gated_residual(&x[0], &x[1], &x[2], 5),
            ),
            check(
                &format!("residual {sizes}"),
                &[(stream, F), (beside, B)],
                |x| ops::residual(&x[0], &x[1]),
            ),
        ]);
    }
    checks
}
