//! Sampling at the points of a grid, whose coordinates run from -1 to 1 over each dimension.

use crate::kernels::par;
use crate::kernels::sample::Tap;
use crate::tensor::Float;

/// How elements near a point are weighted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interpolation {
    Nearest,
    Linear,
    Cubic,
}

/// What is read outside the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outside {
    Zeros,
    Border,
    Reflection,
}

/// How points are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    pub interpolation: Interpolation,
    pub outside: Outside,
    /// -1 and 1 are the centres of the outermost elements, else their outer edges.
    pub align_corners: bool,
}

/// Sizes: X (n, c, extents…), grid (n, points, rank), Y (n, c, points).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    pub n: usize,
    pub c: usize,
    pub rank: usize,
    /// The first `rank` of them count.
    pub extents: [usize; 3],
    pub points: usize,
}

impl Geometry {
    fn plane(&self) -> usize {
        self.extents[..self.rank].iter().product()
    }

    /// Channels of a task, which computes the weights of each point once for all of them.
    fn channels(&self) -> usize {
        (par::GRAIN / self.points.max(1)).max(8)
    }
}

/// The most elements that a point is summed from: four along each of three dimensions.
const MOST: usize = 64;
/// Coordinates beyond are all alike: far outside.
const FAR: f64 = (1i64 << 40) as f64;
/// The coefficient of the cubic filter.
const CUBIC: f64 = -0.75;

/// The elements along one dimension, with weights and their derivatives by the point's coordinate in the grid.
#[derive(Clone, Copy)]
struct Line<T> {
    count: usize,
    /// `None`: outside.
    at: [Option<usize>; 4],
    weight: [T; 4],
    slope: [T; 4],
}

impl Sampling {
    /// First and last coordinate of a dimension.
    fn border<T: Float>(&self, extent: usize) -> [T; 2] {
        let last = T::of(extent as f64 - 1.0);
        let half = T::of(0.5);
        if self.align_corners { [T::zero(), last] } else { [-half, last + half] }
    }

    /// A coordinate mirrored at the borders until it lies between them, and the derivative: 1 or -1.
    fn reflect<T: Float>(&self, x: T, extent: usize) -> (T, T) {
        let [low, high] = self.border::<T>(extent);
        let range = high - low;
        if range <= T::zero() {
            return (low, T::zero());
        }
        let below = x < low;
        if !below && x <= high {
            return (x, T::one());
        }
        let over = if below { low - x } else { x - high };
        let times = (over / range).floor();
        let rest = over - times * range;
        // Back from the border that was crossed, or on from the other one.
        let back = times.to64() % 2.0 == 0.0;
        let inside = if below == back { low + rest } else { high - rest };
        (inside, if back { -T::one() } else { T::one() })
    }

    fn line<T: Float>(&self, grid: T, extent: usize) -> Line<T> {
        let (one, two) = (T::one(), T::of(2.0));
        let length = T::of(extent as f64);
        let (mut x, mut slope) = match self.align_corners {
            true => ((grid + one) / two * (length - one), (length - one) / two),
            false => (((grid + one) * length - one) / two, length / two),
        };
        let mut line = Line { count: 0, at: [None; 4], weight: [T::zero(); 4], slope: [T::zero(); 4] };
        if self.interpolation == Interpolation::Nearest {
            x = T::of(x.to64().round_ties_even());
        }
        let [low, high] = self.border::<T>(extent);
        if x < low || x > high {
            match self.outside {
                Outside::Zeros => {}
                // Its elements are each moved to the border, as in PyTorch and onnxruntime.
                Outside::Border if self.interpolation == Interpolation::Cubic => {}
                Outside::Border => {
                    x = x.max(T::zero()).min(length - one);
                    slope = T::zero();
                }
                Outside::Reflection => {
                    let (inside, sign) = self.reflect(x, extent);
                    (x, slope) = (inside, slope * sign);
                }
            }
        }
        let first = x.floor();
        let ratio = (x - first).to64();
        let base = first.to64().clamp(-FAR, FAR) as i64;
        let mut add = |at: i64, weight: f64, by: f64| {
            let k = line.count;
            line.at[k] = self.index(at, extent);
            (line.weight[k], line.slope[k]) = (T::of(weight), T::of(by) * slope);
            line.count += 1;
        };
        match self.interpolation {
            Interpolation::Nearest => add(base, 1.0, 0.0),
            Interpolation::Linear => {
                add(base, 1.0 - ratio, -1.0);
                add(base + 1, ratio, 1.0);
            }
            Interpolation::Cubic => {
                for k in -1..=2i64 {
                    let distance = ratio - k as f64;
                    let (weight, by) = cubic(distance.abs());
                    add(base + k, weight, by * distance.signum());
                }
            }
        }
        line
    }

    /// Which element stands at a place.
    fn index(&self, at: i64, extent: usize) -> Option<usize> {
        let last = extent as i64 - 1;
        match self.outside {
            _ if (0..=last).contains(&at) => Some(at as usize),
            Outside::Zeros => None,
            Outside::Border => Some(at.clamp(0, last) as usize),
            Outside::Reflection => {
                let (x, _) = self.reflect(at as f64, extent);
                Some((x as i64).clamp(0, last) as usize)
            }
        }
    }

    /// The lines of a point, the first dimension first; a grid names the last one first.
    fn lines<T: Float>(&self, g: &Geometry, point: &[T]) -> [Line<T>; 3] {
        std::array::from_fn(|d| match d < g.rank {
            true => self.line(point[g.rank - 1 - d], g.extents[d]),
            false => Line { count: 1, at: [Some(0); 4], weight: [T::one(); 4], slope: [T::zero(); 4] },
        })
    }
}

/// Weight and derivative at a distance of less than 2.
fn cubic(x: f64) -> (f64, f64) {
    let a = CUBIC;
    match x <= 1.0 {
        true => (((a + 2.0) * x - (a + 3.0)) * x * x + 1.0, (3.0 * (a + 2.0) * x - 2.0 * (a + 3.0)) * x),
        false => (((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a, (3.0 * a * x - 10.0 * a) * x + 8.0 * a),
    }
}

/// Calls `f(element of the plane, places along the lines)` for all elements inside.
fn each<T: Float>(g: &Geometry, lines: &[Line<T>; 3], mut f: impl FnMut(usize, [usize; 3])) {
    let extent = |d: usize| if d < g.rank { g.extents[d] } else { 1 };
    for i in 0..lines[0].count {
        let Some(a) = lines[0].at[i] else { continue };
        for j in 0..lines[1].count {
            let Some(b) = lines[1].at[j] else { continue };
            for k in 0..lines[2].count {
                let Some(c) = lines[2].at[k] else { continue };
                f((a * extent(1) + b) * extent(2) + c, [i, j, k]);
            }
        }
    }
}

/// The elements that a point is summed from.
fn taps<'a, T: Float>(g: &Geometry, s: &Sampling, point: &[T], room: &'a mut [Tap<T>; MOST]) -> &'a [Tap<T>] {
    let lines = s.lines(g, point);
    let mut count = 0;
    each(g, &lines, |at, [i, j, k]| {
        room[count] = (at, lines[0].weight[i] * lines[1].weight[j] * lines[2].weight[k]);
        count += 1;
    });
    &room[..count]
}

/// `Y[n, c, p] = Σ weight · X[n, c, element]`
pub fn sample<T: Float>(g: &Geometry, s: &Sampling, x: &[T], grid: &[T], y: &mut [T]) {
    let (plane, points, together) = (g.plane(), g.points, g.channels());
    let image = g.c * points;
    if y.is_empty() || image == 0 {
        return;
    }
    par::chunks(y, image, |n, y| {
        let grid = &grid[n * points * g.rank..][..points * g.rank];
        par::chunks(y, together * points, |i, y| {
            let x = &x[(n * g.c + i * together) * plane..];
            let mut room = [(0, T::zero()); MOST];
            for (p, point) in grid.chunks_exact(g.rank).enumerate() {
                let taps = taps(g, s, point, &mut room);
                for (c, y) in y.chunks_exact_mut(points).enumerate() {
                    let x = &x[c * plane..][..plane];
                    y[p] = taps.iter().fold(T::zero(), |sum, (at, w)| sum + *w * x[*at]);
                }
            }
        });
    });
}

/// The gradient with respect to X: `dX[n, c, element] += weight · dY[n, c, p]`.
pub fn input_grad<T: Float>(g: &Geometry, s: &Sampling, dy: &[T], grid: &[T], dx: &mut [T]) {
    let (plane, points, together) = (g.plane(), g.points, g.channels());
    let image = g.c * plane;
    if dx.is_empty() || image == 0 {
        return;
    }
    par::chunks(dx, image, |n, dx| {
        let grid = &grid[n * points * g.rank..][..points * g.rank];
        par::chunks(dx, together * plane, |i, dx| {
            dx.fill(T::zero());
            let dy = &dy[(n * g.c + i * together) * points..];
            let mut room = [(0, T::zero()); MOST];
            for (p, point) in grid.chunks_exact(g.rank).enumerate() {
                let taps = taps(g, s, point, &mut room);
                for (c, dx) in dx.chunks_exact_mut(plane).enumerate() {
                    let d = dy[c * points + p];
                    taps.iter().for_each(|(at, w)| dx[*at] += *w * d);
                }
            }
        });
    });
}

/// The gradient with respect to the grid: `Σ_c dY[n, c, p] · Σ slope · X[n, c, element]`, for each of its dimensions.
pub fn grid_grad<T: Float>(g: &Geometry, s: &Sampling, dy: &[T], x: &[T], grid: &[T], dgrid: &mut [T]) {
    let (plane, points) = (g.plane(), g.points);
    let grain = par::GRAIN / (g.c * MOST).max(1);
    par::rows(dgrid, g.rank, grain, |first, out| {
        for (i, out) in out.chunks_exact_mut(g.rank).enumerate() {
            let row = first + i;
            let (n, p) = (row / points, row % points);
            let lines = s.lines(g, &grid[row * g.rank..][..g.rank]);
            let mut total = [T::zero(); 3];
            each(g, &lines, |at, place| {
                let channels = (n * g.c..(n + 1) * g.c)
                    .fold(T::zero(), |sum, c| sum + dy[c * points + p] * x[c * plane + at]);
                for (d, total) in total[..g.rank].iter_mut().enumerate() {
                    let weight = (0..3).fold(T::one(), |product, e| {
                        product * if e == d { lines[e].slope[place[e]] } else { lines[e].weight[place[e]] }
                    });
                    *total += weight * channels;
                }
            });
            out.iter_mut().zip(total[..g.rank].iter().rev()).for_each(|(out, t)| *out = *t);
        }
    });
}
