/// What a kernel sees of an image (C, H, W).
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    /// Height and width, before upsampling.
    pub(super) size: [usize; 2],
    pub(super) kernel: usize,
    pub(super) stride: usize,
    /// Zeros before the first row and the first column.
    pub(super) before: [usize; 2],
    pub(super) upsample: usize,
    /// Width of the output.
    pub(super) width: usize,
}

impl Window {
    /// Values of a channel.
    pub(super) fn plane(&self) -> usize {
        self.size[0] * self.size[1]
    }
}

/// columns (C·k·k, `count`) ← for each output pixel from `first` on, what the kernel covers of x (C, H, W).
pub(super) fn gather(columns: &mut [f32], x: &[f32], w: Window, first: usize, count: usize) {
    let [height, source_width] = w.size;
    let mut rows = columns.chunks_exact_mut(count);
    for x in x.chunks_exact(w.plane()) {
        for dy in 0..w.kernel {
            for dx in 0..w.kernel {
                let Some(row) = rows.next() else { return };
                let (mut at, mut column) = (first / w.width, first % w.width);
                let mut done = 0;
                // The output's rows one by one, the first and the last perhaps in part.
                while done < count {
                    let run = (w.width - column).min(count - done);
                    let to = &mut row[done..done + run];
                    // Row of the upsampled input; below 0 it wraps round and is past the end.
                    let y = (at * w.stride + dy).wrapping_sub(w.before[0]);
                    if y < height * w.upsample {
                        let source = &x[y / w.upsample * source_width..][..source_width];
                        gather_row(to, source, w, column, dx);
                    } else {
                        to.fill(0.0);
                    }
                    done += run;
                    (at, column) = (at + 1, 0);
                }
            }
        }
    }
}

/// Of one row of the input, what tap `dx` sees from the output's columns `column..`.
fn gather_row(to: &mut [f32], source: &[f32], w: Window, column: usize, dx: usize) {
    let (before, end) = (w.before[1], source.len() * w.upsample);
    if w.stride == 1 && w.upsample == 1 {
        // A piece of the row, zeros around it.
        let start = column + dx; // in the padded row
        let zeros = before.saturating_sub(start).min(to.len());
        let (left, rest) = to.split_at_mut(zeros);
        left.fill(0.0);
        let from = (start + zeros).saturating_sub(before).min(end);
        let copied = rest.len().min(end - from);
        rest[..copied].copy_from_slice(&source[from..from + copied]);
        rest[copied..].fill(0.0);
        return;
    }
    for (i, to) in to.iter_mut().enumerate() {
        let x = ((column + i) * w.stride + dx).wrapping_sub(before);
        *to = if x < end { source[x / w.upsample] } else { 0.0 };
    }
}
