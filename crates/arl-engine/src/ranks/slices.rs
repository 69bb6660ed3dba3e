//! Values of parameters of which ranks have slices, and of these pieces: what each owns travels with its place in the whole.

use arl_model::Result;

use super::read;
use crate::backend::Backend;
use crate::engine::Engine;
use crate::placement::Param;

impl<B: Backend + ?Sized> Engine<B> {
    /// As [`Engine::gather_values`], of the parameter of a name, which has so many elements, where the mesh divides the model: ranks
    /// that have nothing of it call it too.
    pub(crate) fn gather_slices(
        &mut self,
        name: &str,
        elements: usize,
        mut fill: impl FnMut(&mut Self, Param, usize, &mut [f32]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        self.check_joined()?;
        let (mut own, mut places): (Vec<f32>, Vec<[u64; 2]>) = (Vec::new(), Vec::new());
        let tensor = self.model.placement.tensors.iter().find(|tensor| tensor.spec.name == name && !tensor.copied);
        if let Some((slice, param)) = tensor.map(|tensor| (tensor.slice.clone(), tensor.param)) {
            for part in self.model.owned(param) {
                let start = own.len();
                own.resize(start + part.len, 0.0);
                fill(self, param.part(part.start, part.len), part.own, &mut own[start..])?;
                let runs = slice.runs(part.start..part.start + part.len);
                places.extend(runs.into_iter().map(|run| [run.start as u64, run.len() as u64]));
            }
        }
        let counts = [places.len() as u64, own.len() as u64];
        let counts: Vec<[u64; 2]> = read(&self.ranks.gather(bytemuck::cast_slice(&counts), |sent| &mut sent.figures)?);
        let most = |of: usize| counts.iter().map(|count| count[of] as usize).max().unwrap_or(0);
        let (most_places, most_values) = (most(0), most(1));
        places.resize(most_places, [0, 0]);
        own.resize(most_values, 0.0);
        let all_places: Vec<[u64; 2]> =
            read(&self.ranks.gather(bytemuck::cast_slice(&places), |sent| &mut sent.figures)?);
        let all: Vec<f32> = read(&self.ranks.gather(bytemuck::cast_slice(&own), |sent| &mut sent.figures)?);
        let mut values = vec![0f32; elements];
        for rank in 0..counts.len() {
            let mut at = rank * most_values;
            for &[start, len] in &all_places[rank * most_places..][..counts[rank][0] as usize] {
                let (start, len) = (start as usize, len as usize);
                values[start..start + len].copy_from_slice(&all[at..at + len]);
                at += len;
            }
        }
        Ok(values)
    }
}
