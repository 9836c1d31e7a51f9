/// numpy's legacy generator `numpy.random.RandomState(seed)`, as far as torch-fidelity uses it.
///
/// It is what fixes the shuffle of the Inception Score and the subsets of KID there, so that those
/// numbers can be reproduced to the digit. MT19937 after Matsumoto & Nishimura 1998 (`init_genrand`).
#[derive(Debug, Clone)]
pub struct NumpyRandomState {
    state: [u32; Self::WORDS],
    next: usize,
}

impl NumpyRandomState {
    const WORDS: usize = 624;
    const OFFSET: usize = 397;

    /// The generator of `numpy.random.RandomState(seed)`.
    pub fn new(seed: u32) -> Self {
        let mut state = [seed; Self::WORDS];
        for i in 1..Self::WORDS {
            let previous = state[i - 1];
            state[i] = (previous ^ (previous >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(i as u32);
        }
        Self {
            state,
            next: Self::WORDS,
        }
    }

    /// A uniform 32-bit word.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == Self::WORDS {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `RandomState.permutation(n)`: a random order of 0..n, for n up to 2³².
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.up_to(i));
        }
        order
    }

    /// A uniform integer in 0..=bound: words masked to the bits of `bound`, until one fits.
    fn up_to(&mut self, bound: usize) -> usize {
        let mask = u32::MAX >> (bound as u32).leading_zeros();
        loop {
            let draw = (self.next_u32() & mask) as usize;
            if draw <= bound {
                return draw;
            }
        }
    }

    fn twist(&mut self) {
        for i in 0..Self::WORDS {
            let y =
                (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % Self::WORDS] & 0x7fff_ffff);
            let magic = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + Self::OFFSET) % Self::WORDS] ^ (y >> 1) ^ magic;
        }
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::NumpyRandomState;

    #[test]
    fn is_mt19937() {
        // The 10000th word of seed 5489 is fixed by the C++ standard ([rand.predef]).
        let mut random = NumpyRandomState::new(5489);
        let last = (0..10_000).map(|_| random.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}
