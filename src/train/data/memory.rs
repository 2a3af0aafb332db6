//! Samples kept from a stream: what is adapted to and judged on is drawn from them.

use crate::error::{Error, Result};
use crate::tensor::{Dims, Tensor};

use super::split::{Purpose, below, rng};
use super::{Batch, Dataset, copy_rows};

/// Where batches of chosen samples come from.
pub trait Samples {
    /// Number of samples.
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The inputs of the samples at `indices`, in that order, into `out`, whose target is left alone.
    fn fill(&self, indices: &[usize], out: &mut Batch) -> Result<()>;
}

/// Data without its target.
impl Samples for Dataset {
    fn len(&self) -> usize {
        Dataset::len(self)
    }

    fn fill(&self, indices: &[usize], out: &mut Batch) -> Result<()> {
        let target = out.target.take();
        let filled = self.batch(indices, None, out);
        out.target = target;
        filled
    }
}

impl Dataset {
    /// The data without their target, and the target.
    pub fn without_target(mut self) -> (Dataset, Option<Tensor>) {
        let target = self.target.take();
        (self, target)
    }
}

/// A bounded number of samples of a stream, kept so that every class that was predicted has about as many places
/// (prediction-balanced reservoir sampling: Gong et al., *NOTE: Robust Continual Test-time Adaptation Against Temporal
/// Correlation*, NeurIPS 2022). Within a class, each sample seen so far is as likely to be kept as any other.
#[derive(Debug)]
pub struct Memory {
    capacity: usize,
    seed: u64,
    /// `[capacity, …]` by input name; inputs that are the same for every sample as they are.
    inputs: Vec<(String, Tensor, bool)>,
    /// The class predicted of each sample that is kept.
    classes: Vec<usize>,
    /// By class: samples seen.
    seen: Vec<u64>,
    total: u64,
}

impl Memory {
    pub fn new(capacity: usize, seed: u64) -> Memory {
        Memory { capacity, seed, inputs: Vec::new(), classes: Vec::new(), seen: Vec::new(), total: 0 }
    }

    /// Samples seen so far.
    pub fn seen(&self) -> u64 {
        self.total
    }

    /// Offers a batch's samples, each with the class that was predicted of it.
    ///
    /// Fails when the inputs are not those of the batches before.
    pub fn offer(&mut self, batch: &Batch, classes: &[usize]) -> Result<()> {
        if self.inputs.is_empty() {
            let kept = |(name, t): &(String, Tensor)| {
                let whole = t.dims().first() != Some(&batch.len());
                let mut dims = Dims::from_slice(t.dims());
                if let (false, Some(n)) = (whole, dims.first_mut()) {
                    *n = self.capacity;
                }
                let kept = if whole { t.clone() } else { Tensor::zeros(t.dtype(), &dims) };
                (name.clone(), kept, whole)
            };
            self.inputs = batch.inputs.iter().map(kept).collect();
        }
        let same = self.inputs.len() == batch.inputs.len()
            && self.inputs.iter().zip(&batch.inputs).all(|((name, kept, whole), (new, t))| {
                let dims = |t: &Tensor| t.dims().get(usize::from(!whole)..).map(<[usize]>::to_vec);
                name == new && kept.dtype() == t.dtype() && dims(kept) == dims(t)
            });
        if !same {
            return Err(Error::Data("a batch of the stream has other inputs than those before it".into()));
        }
        for (row, &class) in classes.iter().enumerate().take(batch.len()) {
            if self.seen.len() <= class {
                self.seen.resize(class + 1, 0);
            }
            self.seen[class] += 1;
            self.total += 1;
            if let Some(place) = self.place(class) {
                self.put(place, row, batch);
                match self.classes.get_mut(place) {
                    Some(c) => *c = class,
                    None => self.classes.push(class),
                }
            }
        }
        Ok(())
    }

    /// Where a new sample of `class` goes, if it is kept.
    fn place(&self, class: usize) -> Option<usize> {
        if self.classes.len() < self.capacity {
            return Some(self.classes.len());
        }
        let mut held = vec![0u64; self.seen.len()];
        self.classes.iter().for_each(|c| held[*c] += 1);
        let most = held.iter().copied().max().unwrap_or(0);
        let mut rng = rng(Purpose::Memory, self.seed, self.total, 0);
        let among = |of: &dyn Fn(usize) -> bool, rng: &mut _| {
            let places: Vec<usize> = (0..self.classes.len()).filter(|i| of(self.classes[*i])).collect();
            let n = places.len() as u64;
            (n > 0).then(|| places[below(rng, n) as usize])
        };
        if held[class] < most {
            // A class that has fewer places takes one of a class that has the most.
            return among(&|c| held[c] == most, &mut rng);
        }
        let keep = below(&mut rng, self.seen[class].max(1)) < held[class];
        if keep { among(&|c| c == class, &mut rng) } else { None }
    }

    fn put(&mut self, place: usize, row: usize, batch: &Batch) {
        for ((_, kept, whole), (_, t)) in self.inputs.iter_mut().zip(&batch.inputs) {
            let size = t.bytes().len() / t.dims().first().copied().unwrap_or(1).max(1);
            if *whole || size == 0 {
                continue;
            }
            kept.bytes_mut()[place * size..][..size].copy_from_slice(&t.bytes()[row * size..][..size]);
        }
    }

    /// `n` different samples in random order, by `(seed, at)`; all of them where there are not as many.
    pub fn draw(&self, n: usize, at: u64) -> Vec<usize> {
        let mut rng = rng(Purpose::Memory, self.seed, at, 1);
        let mut all: Vec<usize> = (0..self.classes.len()).collect();
        let n = n.min(all.len());
        for i in 0..n {
            let j = i + below(&mut rng, (all.len() - i) as u64) as usize;
            all.swap(i, j);
        }
        all.truncate(n);
        all
    }
}

impl Samples for Memory {
    fn len(&self) -> usize {
        self.classes.len()
    }

    fn fill(&self, indices: &[usize], out: &mut Batch) -> Result<()> {
        if let Some(i) = indices.iter().find(|i| **i >= self.classes.len()) {
            return Err(Error::Data(format!("sample {i} of {} kept", self.classes.len())));
        }
        if out.len() != indices.len() || out.inputs.len() != self.inputs.len() {
            let sized = |(name, kept, whole): &(String, Tensor, bool)| {
                let mut dims = Dims::from_slice(kept.dims());
                if let (false, Some(n)) = (whole, dims.first_mut()) {
                    *n = indices.len();
                }
                (name.clone(), Tensor::zeros(kept.dtype(), &dims))
            };
            out.inputs = self.inputs.iter().map(sized).collect();
            out.len = indices.len();
        }
        for ((_, kept, whole), (_, t)) in self.inputs.iter().zip(&mut out.inputs) {
            match whole {
                true => t.bytes_mut().copy_from_slice(kept.bytes()),
                false => copy_rows(kept, indices, t),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(values: &[f32]) -> Batch {
        let t = Tensor::from_slice(&[values.len(), 1], values).unwrap();
        let data = Dataset::from_arrays(vec![("x".into(), t)], None).unwrap();
        let mut out = data.new_batch(values.len());
        data.batch(&(0..values.len()).collect::<Vec<_>>(), None, &mut out).unwrap();
        out
    }

    fn kept(m: &Memory) -> Vec<f32> {
        let mut out = batch(&[0.0]);
        m.fill(&(0..m.len()).collect::<Vec<_>>(), &mut out).unwrap();
        out.inputs[0].1.get::<f32>().unwrap().to_vec()
    }

    #[test]
    fn classes_have_as_many_places_whatever_their_order() {
        let mut m = Memory::new(30, 1);
        for class in 0..3usize {
            for k in 0..40 {
                m.offer(&batch(&[(class * 100 + k) as f32, (class * 100 + k + 40) as f32]), &[class; 2])
                    .unwrap();
            }
        }
        assert_eq!((m.len(), m.seen()), (30, 240));
        let kept = kept(&m);
        for class in 0..3 {
            let of: Vec<f32> = kept.iter().copied().filter(|x| (*x / 100.0) as usize == class).collect();
            assert_eq!(of.len(), 10, "class {class}: {kept:?}");
            // Early and late ones alike.
            let late = of.iter().filter(|x| **x as usize % 100 >= 40).count();
            assert!((1..10).contains(&late), "{of:?}");
        }
    }

    #[test]
    fn the_same_seed_keeps_the_same_and_other_inputs_are_refused() {
        let run = |seed| {
            let mut m = Memory::new(5, seed);
            (0..50).for_each(|i| m.offer(&batch(&[i as f32]), &[i % 2]).unwrap());
            (kept(&m), m.draw(3, 7))
        };
        assert_eq!(run(3), run(3));
        assert_ne!(run(3).0, run(4).0);
        let mut m = Memory::new(5, 0);
        m.offer(&batch(&[1.0]), &[0]).unwrap();
        let mut other = batch(&[1.0]);
        other.inputs[0].0 = "z".into();
        assert!(m.offer(&other, &[0]).is_err());
        let drawn = m.draw(9, 0);
        assert_eq!(drawn, [0]);
    }
}
