use candle_core::{DType, Device};
use rayon::ThreadPoolBuilder;
use tinyfusion_core::StepRng;
use tinyfusion_nn::ops::{gelu_tanh, layer_norm, linear};

use super::*;

const CPU: Device = Device::Cpu;
const BATCH: usize = 20;
const TOKENS: usize = 64;
const WIDTH: usize = 96;

/// A normalised two-layer network, with products large enough (64·96·384 and more) to be spread over threads.
struct Net {
    norm: (Var, Var),
    up: (Var, Var),
    down: (Var, Var),
    unused: Var,
}

impl Net {
    fn new() -> Self {
        let mut rng = StepRng::new(3, 0, 0);
        let mut var = |shape: &[usize], size: f64| {
            let t = rng.normal(shape, &CPU).unwrap();
            Var::from_tensor(&(t * size).unwrap()).unwrap()
        };
        Self {
            norm: (var(&[WIDTH], 1.0), var(&[WIDTH], 0.1)),
            up: (var(&[4 * WIDTH, WIDTH], 0.1), var(&[4 * WIDTH], 0.1)),
            down: (var(&[WIDTH, 4 * WIDTH], 0.05), var(&[WIDTH], 0.1)),
            unused: var(&[3], 1.0),
        }
    }

    fn vars(&self) -> Vec<&Var> {
        let Self {
            norm,
            up,
            down,
            unused,
        } = self;
        vec![&norm.0, &norm.1, &up.0, &up.1, &down.0, &down.1, unused]
    }
}

impl TrainStep for Net {
    type Batch = Tensor;

    fn draw(&self, step: u64) -> Result<Tensor> {
        StepRng::new(7, step, 2).normal((BATCH, TOKENS, WIDTH), &CPU)
    }

    fn loss(&self, batch: &Tensor, rows: Range<usize>) -> Result<StepLoss> {
        let x = batch.narrow(0, rows.start, rows.len())?; // (R, T, D)
        let h = layer_norm(&x, &self.norm.0, &self.norm.1, 1e-6)?;
        let h = gelu_tanh(&linear(&h, &self.up.0, Some(&self.up.1))?)?; // (R, T, 4D)
        let y = linear(&h, &self.down.0, Some(&self.down.1))?; // (R, T, D)
        let loss = (y - x)?.sqr()?.mean_all()?;
        let twice = (loss.detach() * 2.0)?;
        Ok(StepLoss {
            loss,
            scalars: vec![("twice", twice), ("one", Tensor::new(1f32, &CPU)?)],
        })
    }
}

fn parts(n: usize, pieces: usize) -> Vec<Range<usize>> {
    (0..pieces)
        .map(|i| n * i / pieces..n * (i + 1) / pieces)
        .collect()
}

/// What the gradients of a batch say when they are read.
struct Found {
    loss: f64,
    norm: f64,
    scalars: Vec<(&'static str, f64)>,
    grads: Vec<Tensor>,
}

impl Found {
    fn of(found: BatchGradients) -> Self {
        let scalars = found.scalars.iter();
        Self {
            loss: found.loss.read().unwrap(),
            norm: found.clipped(None).unwrap().norm().unwrap(),
            scalars: scalars.map(|(n, s)| (*n, s.read().unwrap())).collect(),
            grads: found.grads,
        }
    }
}

fn gradients(pieces: usize, lanes: usize, threads: usize) -> Found {
    let net = Net::new();
    let batch = net.draw(0).unwrap();
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    let found = pool.install(|| {
        let mut workers = Workers::new(lanes, &net.vars()).unwrap();
        workers
            .run(&net, &batch, &parts(BATCH, pieces), &Stop::default())
            .unwrap()
            .unwrap();
        // Again, so that values left over in the buffers would show.
        workers
            .run(&net, &batch, &parts(BATCH, pieces), &Stop::default())
            .unwrap()
            .unwrap()
    });
    Found::of(found)
}

fn values(t: &Tensor) -> Vec<f64> {
    t.flatten_all()
        .unwrap()
        .to_dtype(DType::F64)
        .unwrap()
        .to_vec1()
        .unwrap()
}

#[test]
fn pieces_of_any_size_give_the_gradients_of_the_whole_batch() {
    let whole = gradients(1, 1, 2);
    // Three pieces are of 6, 7 and 7 samples: they must not weigh the same.
    for (pieces, lanes) in [(2, 2), (3, 3), (3, 2), (5, 2), (2, 1)] {
        let cut = gradients(pieces, lanes, 2);
        assert!((cut.loss - whole.loss).abs() < 1e-6 * whole.loss);
        assert!((cut.norm - whole.norm).abs() < 1e-5 * whole.norm);
        for (i, (a, b)) in whole.grads.iter().zip(&cut.grads).enumerate() {
            assert_eq!(a.dims(), b.dims());
            let (a, b) = (values(a), values(b));
            let largest = a.iter().fold(0f64, |m, v| m.max(v.abs()));
            let worst = a
                .iter()
                .zip(&b)
                .map(|(x, y)| (x - y).abs())
                .fold(0f64, f64::max);
            assert!(
                worst <= 1e-5 * largest,
                "{pieces} pieces, gradient {i}: {worst} of {largest}"
            );
        }
        for ((name, a), (other, b)) in whole.scalars.iter().zip(&cut.scalars) {
            assert_eq!(name, other);
            assert!((a - b).abs() < 1e-6 * a, "{name}: {a} {b}");
        }
    }
    assert!((whole.scalars[0].1 - 2.0 * whole.loss).abs() < 1e-6 * whole.loss);
}

#[test]
fn the_number_of_threads_does_not_show_in_a_single_bit() {
    let bits = |g: &Found| -> Vec<Vec<u64>> {
        g.grads
            .iter()
            .map(|t| values(t).iter().map(|v| v.to_bits()).collect())
            .collect()
    };
    let one = gradients(5, 3, 1);
    for threads in [2, 3, 4, 8] {
        let more = gradients(5, 3, threads);
        assert_eq!(one.loss.to_bits(), more.loss.to_bits(), "{threads} threads");
        assert_eq!(one.norm.to_bits(), more.norm.to_bits(), "{threads} threads");
        assert!(bits(&one) == bits(&more), "{threads} threads");
    }
}

#[test]
fn the_norm_is_that_of_all_gradients_in_f64_and_an_untouched_variable_has_zeros() {
    let got = gradients(2, 2, 2);
    let squares: f64 = got.grads.iter().flat_map(values).map(|v| v * v).sum();
    assert!((got.norm - squares.sqrt()).abs() < 1e-12 * got.norm);
    assert!(got.norm > 0.0);
    assert_eq!(values(&got.grads[6]), [0.0; 3]);
    assert!(
        got.grads[..6]
            .iter()
            .all(|g| values(g).iter().any(|v| *v != 0.0))
    );
}

/// Misbehaves where the second half of the batch begins.
struct Odd(Var, &'static str);

impl TrainStep for Odd {
    type Batch = ();

    fn draw(&self, _step: u64) -> Result<()> {
        Ok(())
    }

    fn loss(&self, _batch: &(), rows: Range<usize>) -> Result<StepLoss> {
        let second = rows.start > 0;
        let scalars = if second && self.1 == "scalars" {
            vec![]
        } else {
            vec![("mse", Tensor::new(1f32, &CPU)?)]
        };
        match self.1 {
            "panic" if second => panic!("no such class: 11"),
            "error" if second => return Err(Error::run("no such file")),
            _ => {}
        }
        Ok(StepLoss {
            loss: self.0.sqr()?.sum_all()?,
            scalars,
        })
    }
}

#[test]
fn what_goes_wrong_in_a_micro_batch_is_told() {
    let odd = |what| {
        let odd = Odd(Var::ones(2, DType::F32, &CPU).unwrap(), what);
        let mut workers = Workers::new(2, &[&odd.0]).unwrap();
        let result = workers.run(&odd, &(), &parts(4, 2), &Stop::default());
        result
            .map(|g| g.unwrap().loss.read().unwrap())
            .map_err(|e| e.to_string())
    };
    assert_eq!(odd("nothing"), Ok(2.0));
    assert_eq!(
        odd("panic").unwrap_err(),
        "a worker thread panicked: no such class: 11"
    );
    assert_eq!(odd("error").unwrap_err(), "no such file");
    let scalars = odd("scalars").unwrap_err();
    assert!(
        scalars.contains("different scalars") && scalars.contains("mse"),
        "{scalars}"
    );
}
