//! The 94 convolutions of the network, in the names and order of PyTorch's checkpoint.

use super::conv::Shape;

/// Number of classes of the 2015 graph.
pub(crate) const CLASSES: usize = 1008;

/// Values of the last spatial mean, the features of FID.
pub(crate) const FEATURES: usize = 2048;

/// One `BasicConv2d`: convolution, batch normalisation, ReLU.
pub(crate) struct Layer {
    /// Its keys are `<name>.conv.weight` and `<name>.bn.*`.
    pub(crate) name: String,
    pub(crate) shape: Shape,
}

/// The layers of a block whose name stands before theirs.
struct Names<'a>(&'a mut Vec<Layer>, String);

impl Names<'_> {
    /// `padding` keeps the size (`true`) or is zero.
    fn add(&mut self, name: &str, io: [usize; 2], kernel: [usize; 2], stride: usize, same: bool) {
        self.0.push(Layer {
            name: format!("{}{name}", self.1),
            shape: Shape {
                inputs: io[0],
                outputs: io[1],
                kernel,
                stride,
                padding: if same { kernel.map(|k| k / 2) } else { [0, 0] },
            },
        });
    }

    /// Stride 1, same size.
    fn conv(&mut self, name: &str, io: [usize; 2], kernel: [usize; 2]) {
        self.add(name, io, kernel, 1, true);
    }

    /// 3 × 3 with stride 2, no padding.
    fn halve(&mut self, name: &str, io: [usize; 2]) {
        self.add(name, io, [3, 3], 2, false);
    }
}

/// All layers.
pub(crate) fn layers() -> Vec<Layer> {
    let mut all = Vec::new();
    let mut stem = Names(&mut all, String::new());
    stem.halve("Conv2d_1a_3x3", [3, 32]);
    stem.add("Conv2d_2a_3x3", [32, 32], [3, 3], 1, false);
    stem.conv("Conv2d_2b_3x3", [32, 64], [3, 3]);
    stem.conv("Conv2d_3b_1x1", [64, 80], [1, 1]);
    stem.add("Conv2d_4a_3x3", [80, 192], [3, 3], 1, false);
    for (name, inputs, pool) in [("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)] {
        let mut block = Names(&mut all, format!("Mixed_{name}."));
        block.conv("branch1x1", [inputs, 64], [1, 1]);
        block.conv("branch5x5_1", [inputs, 48], [1, 1]);
        block.conv("branch5x5_2", [48, 64], [5, 5]);
        block.conv("branch3x3dbl_1", [inputs, 64], [1, 1]);
        block.conv("branch3x3dbl_2", [64, 96], [3, 3]);
        block.conv("branch3x3dbl_3", [96, 96], [3, 3]);
        block.conv("branch_pool", [inputs, pool], [1, 1]);
    }
    let mut block = Names(&mut all, "Mixed_6a.".into());
    block.halve("branch3x3", [288, 384]);
    block.conv("branch3x3dbl_1", [288, 64], [1, 1]);
    block.conv("branch3x3dbl_2", [64, 96], [3, 3]);
    block.halve("branch3x3dbl_3", [96, 96]);
    for (name, c) in [("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)] {
        let mut block = Names(&mut all, format!("Mixed_{name}."));
        block.conv("branch1x1", [768, 192], [1, 1]);
        block.conv("branch7x7_1", [768, c], [1, 1]);
        block.conv("branch7x7_2", [c, c], [1, 7]);
        block.conv("branch7x7_3", [c, 192], [7, 1]);
        block.conv("branch7x7dbl_1", [768, c], [1, 1]);
        block.conv("branch7x7dbl_2", [c, c], [7, 1]);
        block.conv("branch7x7dbl_3", [c, c], [1, 7]);
        block.conv("branch7x7dbl_4", [c, c], [7, 1]);
        block.conv("branch7x7dbl_5", [c, 192], [1, 7]);
        block.conv("branch_pool", [768, 192], [1, 1]);
    }
    let mut block = Names(&mut all, "Mixed_7a.".into());
    block.conv("branch3x3_1", [768, 192], [1, 1]);
    block.halve("branch3x3_2", [192, 320]);
    block.conv("branch7x7x3_1", [768, 192], [1, 1]);
    block.conv("branch7x7x3_2", [192, 192], [1, 7]);
    block.conv("branch7x7x3_3", [192, 192], [7, 1]);
    block.halve("branch7x7x3_4", [192, 192]);
    for (name, inputs) in [("7b", 1280), ("7c", 2048)] {
        let mut block = Names(&mut all, format!("Mixed_{name}."));
        block.conv("branch1x1", [inputs, 320], [1, 1]);
        block.conv("branch3x3_1", [inputs, 384], [1, 1]);
        block.conv("branch3x3_2a", [384, 384], [1, 3]);
        block.conv("branch3x3_2b", [384, 384], [3, 1]);
        block.conv("branch3x3dbl_1", [inputs, 448], [1, 1]);
        block.conv("branch3x3dbl_2", [448, 384], [3, 3]);
        block.conv("branch3x3dbl_3a", [384, 384], [1, 3]);
        block.conv("branch3x3dbl_3b", [384, 384], [3, 1]);
        block.conv("branch_pool", [inputs, 192], [1, 1]);
    }
    all
}

/// Endings of a layer's batch normalisation, each (outputs).
pub(crate) const NORM: [&str; 4] = ["weight", "bias", "running_mean", "running_var"];

/// Every tensor that a weight file must have, with its shape: 472 of them.
pub(crate) fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    for Layer { name, shape } in layers() {
        let [rows, columns] = shape.kernel;
        all.push((
            format!("{name}.conv.weight"),
            vec![shape.outputs, shape.inputs, rows, columns],
        ));
        for ending in NORM {
            all.push((format!("{name}.bn.{ending}"), vec![shape.outputs]));
        }
    }
    all.push(("fc.weight".into(), vec![CLASSES, FEATURES]));
    all.push(("fc.bias".into(), vec![CLASSES]));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_published_size() {
        assert_eq!(layers().len(), 94);
        let tensors = tensors();
        assert_eq!(tensors.len(), 472);
        let parameters: usize = tensors
            .iter()
            .filter(|(name, _)| !name.contains("running_"))
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        // torchvision counts 27,161,264, of which 3,326,696 are the auxiliary head's; the last layer has 1008 classes here, not 1000.
        assert_eq!(parameters, 27_161_264 - 3_326_696 + 8 * 2049);
    }
}
