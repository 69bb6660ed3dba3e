//! Whole weights for what rank 0 computes alone, where a mesh divides the model: it asks for a part when it needs it, and of the ranks
//! that have the same of a parameter one gives it, or each its piece. What is given travels with its place in the whole parameter.

use arl_model::{Error, ErrorCode, Nf4, Result};
use half::f16;

use super::{PART, Ranks, read};
use crate::backend::{Backend, Buffer, DType, split_master};
use crate::model::Model;
use crate::nf4::read_back_nf4;
use crate::placement::shards::Part;
use crate::placement::{Param, Tensor};
use crate::whole::Whole;

/// Bytes that a rank gives at a time, at most.
const MESSAGE: usize = 4 * PART;

/// The number of a parameter in the table that all ranks have, its first element that is given, and how many are.
type Place = [u64; 3];

/// Where this rank has what it gives.
#[derive(Clone, Copy, Debug)]
enum Source {
    Weights(Buffer),
    /// So many elements from one on of a parameter in NF4, which is given in the type of weights.
    Quantized(Param, usize, usize),
}

impl Model {
    /// What this rank gives of a part: places in whole parameters, and on this device.
    fn given(&self, part: Part) -> Vec<(Place, Source)> {
        let mut given = Vec::new();
        let mut table = self.placement.table().into_iter().zip(0u64..);
        for Tensor { spec, slice, param, copied } in &self.placement.tensors {
            // Tensors of this rank are in the order of the table.
            let Some((_, number)) = table.find(|(other, _)| other.name == spec.name) else { break };
            // Where ranks divide weights, each of a replica has a piece; what stays whole, all of them have, and now what is in NF4.
            let pieces = self.shards().is_some() && part != Part::Whole && !param.quantized;
            let first = if pieces { self.place.replica() == 0 } else { self.place.index(param.axis) == 0 };
            if Part::of(spec) != part || *copied || !first {
                continue;
            }
            let mut give = |start: usize, len: usize, source: &dyn Fn(usize, usize) -> Source| {
                let mut at = 0;
                for run in slice.runs(start..start + len) {
                    for first in run.clone().step_by(PART) {
                        let len = PART.min(run.end - first);
                        given.push(([number, first as u64, len as u64], source(at, len)));
                        at += len;
                    }
                }
            };
            if param.quantized {
                give(0, param.len, &|at, len| Source::Quantized(*param, at, len));
                continue;
            }
            for (start, buffer) in self.weight_parts(*param) {
                give(start, buffer.len, &|at, len| Source::Weights(buffer.slice(at, len)));
            }
        }
        given
    }

    /// Where elements that are given come to be, in the array of a whole model's weights.
    fn target(&self, whole: &Whole, [number, first, len]: Place) -> Result<Buffer> {
        let param = whole.params.get(number as usize).copied().unwrap_or_default();
        let (first, len) = (first as usize, len as usize);
        if first + len > param.len {
            let what = format!("a rank gives {len} elements from {first} on of parameter {number}, of {}", param.len);
            return Err(Error::new(ErrorCode::Internal, what));
        }
        Ok(self.store.weight(param).slice(first, len))
    }
}

/// Reads what is given.
struct Reader<'a, B: ?Sized> {
    backend: &'a mut B,
    model: &'a Model,
    /// The parameter in NF4 that was read last: its parts are read one behind the other.
    last: Option<(usize, Nf4)>,
}

impl<B: Backend + ?Sized> Reader<'_, B> {
    /// Appends the bytes of a source.
    fn append(&mut self, source: Source, bytes: &mut Vec<u8>) -> Result<()> {
        let start = bytes.len();
        let (param, first, len) = match source {
            Source::Weights(buffer) => {
                bytes.resize(start + buffer.bytes(), 0);
                return self.backend.read_back(buffer, &mut bytes[start..]);
            }
            Source::Quantized(param, first, len) => (param, first, len),
        };
        let mut values = vec![0f32; len];
        self.nf4(param)?.read(first, &mut values);
        match self.model.dtype {
            DType::F16 => values.iter().for_each(|&value| bytes.extend(f16::from_f32(value).to_ne_bytes())),
            DType::F32 => bytes.extend_from_slice(bytemuck::cast_slice(&values)),
            _ => values.iter().for_each(|&value| bytes.extend(split_master(value).0.to_ne_bytes())),
        }
        Ok(())
    }

    fn nf4(&mut self, param: Param) -> Result<&Nf4> {
        let known = self.last.take().filter(|(offset, _)| *offset == param.offset);
        let known = match known {
            Some(known) => known,
            None => {
                let parts = |store| self.model.placement.quantized.parts(&store, param);
                let part = self.model.store.quantized.map_or_else(Vec::new, parts).first().copied();
                let missing = || Error::new(ErrorCode::Internal, "weights in 4 bits have no place");
                (param.offset, read_back_nf4(self.backend, part.ok_or_else(missing)?.1)?)
            }
        };
        Ok(&self.last.insert(known).1)
    }
}

/// How many of consecutive things of so many bytes are given at a time; none has more than [`MESSAGE`].
fn messages(sizes: impl Iterator<Item = usize>) -> Vec<usize> {
    let (mut counts, mut bytes): (Vec<usize>, usize) = (Vec::new(), 0);
    for size in sizes {
        bytes += size;
        match counts.last_mut().filter(|_| bytes <= MESSAGE) {
            Some(count) => *count += 1,
            None => {
                counts.push(1);
                bytes = size;
            }
        }
    }
    counts
}

/// What is left of consecutive things that are given message by message.
struct Messages<'a, T> {
    rest: &'a [T],
    counts: std::vec::IntoIter<usize>,
}

impl<'a, T> Messages<'a, T> {
    fn of(all: &'a [T], bytes: impl Fn(&T) -> usize) -> Self {
        Messages { rest: all, counts: messages(all.iter().map(bytes)).into_iter() }
    }

    /// Those of the next message; behind the last one, none.
    fn next(&mut self) -> &'a [T] {
        let (message, rest) = self.rest.split_at(self.counts.next().unwrap_or(0));
        self.rest = rest;
        message
    }
}

impl Ranks {
    /// Puts the weights of a part of a whole model together, where they are not there from before.
    pub(super) fn need_whole<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        model: &Model,
        whole: &Whole,
        part: Part,
    ) -> Result<()> {
        for part in [Part::Whole, part] {
            if whole.parts.claim(&mut self.whole, part) {
                self.check_first()?;
                self.ask(part.number())?;
                self.give(backend, &whole.divided, part, |place| model.target(whole, place))?;
            }
        }
        Ok(())
    }

    /// Gives rank 0 what this rank has of a part; all ranks call it. There `target` says where what is given comes to be.
    pub(super) fn give<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        model: &Model,
        part: Part,
        target: impl Fn(Place) -> Result<Buffer>,
    ) -> Result<()> {
        self.gather_quantized(backend, model, part)?;
        let (places, sources): (Vec<Place>, Vec<Source>) = model.given(part).into_iter().unzip();
        let size = |source: &Source| match source {
            Source::Weights(buffer) => buffer.bytes(),
            Source::Quantized(_, _, len) => len * model.dtype.bytes(),
        };
        let own = [places.len() as u64, messages(sources.iter().map(size)).len() as u64];
        let counts: Vec<[u64; 2]> = read(&self.gather(bytemuck::cast_slice(&own), |sent| &mut sent.figures)?);
        let lengths: Vec<usize> = counts.iter().map(|[places, _]| *places as usize * size_of::<Place>()).collect();
        let given = self.gather_lengths_to_first(bytemuck::cast_slice(&places), &lengths)?;
        let targets = given.iter().map(|places| read(places).into_iter().map(&target).collect::<Result<Vec<Buffer>>>());
        let targets = targets.collect::<Result<Vec<_>>>()?;
        let mut gives = Messages::of(&sources, size);
        let mut takes: Vec<_> = targets.iter().map(|all| Messages::of(all, |buffer| buffer.bytes())).collect();
        let mut last = None;
        for _ in 0..counts.iter().map(|[_, messages]| *messages).max().unwrap_or(0) {
            let (mut reader, mut message) = (Reader { backend: &mut *backend, model, last }, Vec::new());
            gives.next().iter().try_for_each(|source| reader.append(*source, &mut message))?;
            last = reader.last;
            let places: Vec<&[Buffer]> = takes.iter_mut().map(Messages::next).collect();
            let lengths: Vec<usize> = places.iter().map(|all| all.iter().map(|buffer| buffer.bytes()).sum()).collect();
            for (message, buffers) in self.gather_lengths_to_first(&message, &lengths)?.iter().zip(places) {
                let mut rest = message.as_slice();
                for buffer in buffers {
                    let (values, behind) = rest.split_at(buffer.bytes());
                    backend.upload(values, *buffer);
                    rest = behind;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_hold_what_fits_together() {
        let of = |sizes: &[usize]| messages(sizes.iter().copied());
        assert_eq!(of(&[]), [] as [usize; 0]);
        assert_eq!(of(&[MESSAGE, 1, MESSAGE - 1, 5, 7]), [1, 2, 2]);
    }
}
