//! The engine on its thread: options and micro-batches in, statistics out.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use arl_engine::backend::Backend;
use arl_engine::{Engine as Core, Ticket, Weights};
use arl_image::ImageProcessor;
use arl_model::{Checkpoint, Error, ErrorCode, ExportOverrides, Lora, ModelConfig, Result};
use napi::Env;
use napi::bindgen_prelude::{FnArgs, Function, Int32Array, Object, Uint8Array};
use napi::threadsafe_function::ThreadsafeFunctionCallMode;
use napi_derive::napi;

use crate::adapter::{sizes, weight_dtype};
use crate::batch::{
    MicroBatch, PromptImages, batch_from_js, batches_from_js, prepared, prepared_prompts, prompts_from_js,
};
use crate::device::{backend, device_kind};
use crate::error::{sync, to_napi};
use crate::parts::config;
use crate::ranks::Ranks;
use crate::values::{
    AdaptedLayers, EngineInfo, EngineOptions, GenerateOptions, MemoryPlan, ModelFacts, StepHyper, core_options,
    hyper_from_js, plan_to_js, seed, stats_to_js, step_to_js,
};
use crate::worker::Worker;

/// Plans the memory of an engine with these options, and reserves none.
#[napi]
pub fn plan_memory(options: EngineOptions) -> napi::Result<MemoryPlan> {
    sync(|| {
        let config = config(&options)?;
        let core = core_options(&options)?;
        let plan = arl_engine::plan_memory_of(&config, &core, device_kind(&options.device)?)?;
        let lora = core.lora.as_ref().map(|lora| Lora::new(&config, &lora.config)).transpose()?;
        Ok(plan_to_js(plan, sizes(&config, lora.as_ref())))
    })
}

/// Reads `config.json` of a model's folder, and refuses what the engine cannot train; the folder needs no more.
#[napi]
pub fn model_config(model_dir: String) -> napi::Result<ModelFacts> {
    sync(|| {
        let config = ModelConfig::from_dir(&PathBuf::from(model_dir))?;
        Ok(ModelFacts {
            model_type: config.family.as_str().to_string(),
            vocab_size: config.vocab_size as u32,
            max_position_embeddings: config.max_position_embeddings as u32,
        })
    })
}

/// Proves that the weights of a model's folder are those of its `config.json`, by names, shapes and types; reads no values.
#[napi]
pub fn check_weights(model_dir: String) -> napi::Result<()> {
    sync(|| {
        let dir = PathBuf::from(model_dir);
        Checkpoint::open(&dir, &ModelConfig::from_dir(&dir)?.text_alone()).map(drop)
    })
}

type AnyEngine = Core<dyn Backend>;

/// A model on a device, on a thread of its own. Jobs run in the order of their calls.
#[napi]
pub struct Engine {
    worker: Mutex<Option<Worker<AnyEngine>>>,
    interrupt: Arc<AtomicBool>,
    /// What makes patches of pixels; none: the vision tower is not in the engine.
    processor: Option<Arc<ImageProcessor>>,
    /// Whether other ranks compute each step with this one: then none may leave it half-way.
    joined: AtomicBool,
    flops: arl_engine::Flops,
    adapted: Option<Vec<AdaptedLayers>>,
    model_type: String,
    vocab_size: u32,
    max_position_embeddings: u32,
    device: String,
    dtype: String,
    unknown_keys: Vec<String>,
    notice: Option<String>,
    export_changes: Vec<String>,
}

#[napi]
impl Engine {
    /// Reserves all memory and reads the weights.
    #[napi(ts_return_type = "Promise<Engine>")]
    pub fn open(env: &Env, options: EngineOptions) -> napi::Result<Object<'_>> {
        let threads = options.threads.unwrap_or(0) as usize;
        let dtype = options.dtype.clone();
        let open = move || {
            let weights = match (options.restored, options.init_from_config) {
                (Some(true), _) => Weights::Restored,
                (_, Some(true)) => Weights::Random(seed(&options)),
                _ => Weights::Checkpoint,
            };
            let mut engine = Core::open(
                backend(&options.device)?,
                &PathBuf::from(&options.model_dir),
                weights,
                &core_options(&options)?,
            )?;
            if let (Some(dir), Weights::Checkpoint | Weights::Random(_)) = (&options.adapter_dir, weights) {
                engine.load_adapter(&PathBuf::from(dir))?;
            }
            let changes = engine.describe_export(&ExportOverrides {
                chat_template: options.export_chat_template.clone(),
                stop_ids: options.export_stop_ids.clone().unwrap_or_default(),
            });
            let sizes = sizes(engine.config(), engine.lora());
            let config = engine.config().clone();
            let dir = PathBuf::from(&options.model_dir);
            let processor = config.vision.as_ref().map(|_| ImageProcessor::from_dir(&dir)).transpose()?.map(Arc::new);
            let found =
                (engine.interrupt_flag(), config, sizes, (engine.device(), processor), engine.notice(), changes);
            Ok((engine, found))
        };
        Worker::start(env, "arl-engine", threads, open, move |worker, found| {
            let (interrupt, config, (flops, adapted), (device, processor), notice, changes) = found;
            Engine {
                worker: Mutex::new(Some(worker)),
                interrupt,
                processor,
                joined: AtomicBool::new(false),
                flops,
                adapted,
                model_type: config.family.as_str().to_string(),
                vocab_size: config.vocab_size as u32,
                max_position_embeddings: config.max_position_embeddings as u32,
                device,
                dtype,
                unknown_keys: config.unknown_keys.clone(),
                notice,
                export_changes: changes,
            }
        })
    }

    /// What the engine holds.
    #[napi]
    pub fn info(&self) -> EngineInfo {
        EngineInfo {
            parameters: self.flops.parameters as f64,
            trained_parameters: self.flops.trained as f64,
            model_type: self.model_type.clone(),
            vocab_size: self.vocab_size,
            max_position_embeddings: self.max_position_embeddings,
            device: self.device.clone(),
            dtype: self.dtype.clone(),
            flops_per_token: self.flops.per_token,
            attention_flops: self.flops.attention,
            unknown_keys: self.unknown_keys.clone(),
            notice: self.notice.clone(),
            export_changes: self.export_changes.clone(),
        }
    }

    fn submit<'env, T, R>(
        &self,
        env: &'env Env,
        job: impl FnOnce(&mut AnyEngine) -> Result<T> + Send + 'static,
        into: impl FnOnce(T) -> R + Send + 'static,
    ) -> napi::Result<Object<'env>>
    where
        T: Send + 'static,
        R: napi::bindgen_prelude::ToNapiValue + 'static,
    {
        self.worker(|worker| worker.submit(env, job, into))
    }

    fn worker<T>(&self, with: impl FnOnce(&Worker<AnyEngine>) -> napi::Result<T>) -> napi::Result<T> {
        let worker = self.worker.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match worker.as_ref() {
            Some(worker) => with(worker),
            None => Err(to_napi(&Error::new(ErrorCode::Internal, "the engine is closed"))),
        }
    }

    /// Bytes reserved, by category.
    #[napi(ts_return_type = "Promise<MemoryPlan>")]
    pub fn memory<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let sizes = (self.flops, self.adapted.clone());
        self.submit(env, |engine| Ok(engine.memory()), move |plan| plan_to_js(plan, sizes))
    }

    /// ONE optimizer step over all micro-batches.
    #[napi(ts_return_type = "Promise<StepStats>")]
    pub fn step<'env>(&self, env: &'env Env, batches: Vec<MicroBatch>, hyper: StepHyper) -> napi::Result<Object<'env>> {
        let (batches, hyper, processor) = (batches_from_js(&batches), hyper_from_js(&hyper), self.processor.clone());
        self.submit(env, move |engine| engine.step(&prepared(batches, processor.as_deref())?, hyper), step_to_js)
    }

    /// Queues the gradients of a step after the step in progress; no weight changes yet. Resolves with the step's ticket once
    /// they are queued. Until `finishStep`, only `saveState` and `exportModel` keep the step; every other computation discards
    /// it.
    #[napi(ts_return_type = "Promise<number>")]
    pub fn submit_step<'env>(
        &self,
        env: &'env Env,
        batches: Vec<MicroBatch>,
        hyper: StepHyper,
    ) -> napi::Result<Object<'env>> {
        let (batches, hyper, processor) = (batches_from_js(&batches), hyper_from_js(&hyper), self.processor.clone());
        self.submit(
            env,
            move |engine| engine.submit(&prepared(batches, processor.as_deref())?, hyper),
            |ticket| ticket.0 as f64,
        )
    }

    /// Queues the update of a submitted step at once, and resolves with its statistics when the device has computed them.
    /// Another step can be submitted meanwhile. A step that follows a failed or discarded one fails with `ARL_INTERRUPTED`.
    #[napi(ts_return_type = "Promise<StepStats>")]
    pub fn finish_step<'env>(&self, env: &'env Env, ticket: f64) -> napi::Result<Object<'env>> {
        let ticket = Ticket(ticket as u64);
        self.worker(|worker| {
            worker.submit_waiting(
                env,
                move |engine| engine.apply(ticket),
                move |engine| engine.arrived(ticket),
                move |engine| engine.finish(ticket),
                step_to_js,
            )
        })
    }

    /// Has other ranks compute each step together with this one: `submitStep` then takes this rank's micro-batches, and
    /// figures are those of the whole step. All ranks call the same methods in the same order. `id`: what their GPUs make a
    /// communicator with, all at once; absent: what ranks exchange goes through host memory.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn join_ranks<'env>(
        &self,
        env: &'env Env,
        ranks: &Ranks,
        id: Option<Uint8Array>,
    ) -> napi::Result<Object<'env>> {
        let group = sync(|| ranks.group(id.as_deref()))?;
        self.joined.store(true, Ordering::Relaxed);
        self.submit(env, move |engine| engine.join(group), |()| ())
    }

    /// A hash of weights, moments, step count and loss scale: ranks that train together have the same. Where they divide weights,
    /// all of them call it at once.
    #[napi(ts_return_type = "Promise<string>")]
    pub fn fingerprint<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.submit(env, |engine| engine.fingerprint(), |hash| hash)
    }

    /// Sends rank 0 the weights that it asks for while it evaluates or generates alone, until it calls `endServing`. Does nothing
    /// where every rank has all weights.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn serve_weights<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.submit(env, |engine| engine.serve_weights(), |()| ())
    }

    /// Ends `serveWeights` on the other ranks.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn end_serving<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.submit(env, |engine| engine.end_serving(), |()| ())
    }

    /// Discards the submitted steps that are not finished, even while their gradients are being computed (but where other ranks
    /// compute them too), and clears an interrupt that came too late for the computation it was meant for.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn discard_step<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        if !self.joined.load(Ordering::Relaxed) {
            self.interrupt();
        }
        let interrupt = Arc::clone(&self.interrupt);
        self.submit(
            env,
            move |engine| {
                interrupt.store(false, Ordering::Relaxed);
                engine.discard();
                Ok(())
            },
            |()| (),
        )
    }

    /// The loss of each micro-batch, with the weights as they are.
    #[napi(ts_return_type = "Promise<MicroBatchStats[]>")]
    pub fn evaluate<'env>(&self, env: &'env Env, batches: Vec<MicroBatch>) -> napi::Result<Object<'env>> {
        let (batches, processor) = (batches_from_js(&batches), self.processor.clone());
        self.submit(
            env,
            move |engine| engine.evaluate(&prepared(batches, processor.as_deref())?),
            |stats| stats.into_iter().map(stats_to_js).collect::<Vec<_>>(),
        )
    }

    /// The loss of each sequence of a micro-batch, with the weights as they are: sums that do not depend on the other sequences.
    #[napi(ts_return_type = "Promise<MicroBatchStats[]>")]
    pub fn evaluate_sequences<'env>(&self, env: &'env Env, batch: MicroBatch) -> napi::Result<Object<'env>> {
        let (batch, processor) = (vec![batch_from_js(&batch)], self.processor.clone());
        self.submit(
            env,
            move |engine| engine.evaluate_sequences(&prepared(batch, processor.as_deref())?[0]),
            |stats| stats.into_iter().map(stats_to_js).collect::<Vec<_>>(),
        )
    }

    /// Generates a reply to each prompt, in one batch. `onToken` receives each token, with its prompt's index, as soon as it is
    /// chosen; its last calls may come after the promise resolves. `seen` has what the model sees of each prompt; absent: they
    /// are text.
    #[napi(ts_return_type = "Promise<Int32Array[]>")]
    pub fn generate<'env>(
        &self,
        env: &'env Env,
        prompts: Vec<Int32Array>,
        options: GenerateOptions,
        #[napi(ts_arg_type = "(prompt: number, token: number) => void")] on_token: Option<
            Function<'_, FnArgs<(u32, i32)>, ()>,
        >,
        seen: Option<Vec<PromptImages>>,
    ) -> napi::Result<Object<'env>> {
        let prompts = prompts_from_js(&prompts, seen.as_deref()).map_err(|error| to_napi(&error))?;
        let processor = self.processor.clone();
        let options = arl_engine::GenerateOptions {
            max_new_tokens: options.max_new_tokens as usize,
            stop_ids: options.stop_ids.into_iter().map(|id| id as i32).collect(),
            temperature: options.temperature.unwrap_or(0.0) as f32,
            top_k: options.top_k.unwrap_or(0) as usize,
            top_p: options.top_p.unwrap_or(1.0) as f32,
            seed: options.seed.unwrap_or(0.0) as u64,
        };
        let send = on_token.map(|call| call.build_threadsafe_function().build()).transpose()?;
        let mut on_token = move |prompt: usize, token: i32| {
            if let Some(send) = &send {
                // Fails only while the process ends, and then nothing reads the tokens.
                send.call((prompt as u32, token).into(), ThreadsafeFunctionCallMode::NonBlocking);
            }
        };
        self.submit(
            env,
            move |engine| {
                let prompts = prepared_prompts(prompts, processor.as_deref())?;
                engine.generate_streaming(&prompts, &options, &mut on_token)
            },
            |replies| replies.into_iter().map(Int32Array::from).collect::<Vec<_>>(),
        )
    }

    /// Exact weights, moments, step count and loss scale, as safetensors in `dir`. Where ranks divide moments, all of them save,
    /// export and read tensors at once.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn save_state<'env>(&self, env: &'env Env, dir: String) -> napi::Result<Object<'env>> {
        self.submit(env, move |engine| engine.save_state(&PathBuf::from(dir)), |()| ())
    }

    /// Restores what `saveState` wrote. Resolves with what a user should know: why results will differ in bits.
    #[napi(ts_return_type = "Promise<string | null>")]
    pub fn restore_state<'env>(&self, env: &'env Env, dir: String) -> napi::Result<Object<'env>> {
        self.submit(env, move |engine| engine.restore_state(&PathBuf::from(dir)), |notice| notice)
    }

    /// Writes a folder in Hugging Face's layout; `dtype` absent: the type of the weights that the engine was opened on.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn export_model<'env>(
        &self,
        env: &'env Env,
        dir: String,
        #[napi(ts_arg_type = "'f32' | 'bf16' | 'f16'")] dtype: Option<String>,
    ) -> napi::Result<Object<'env>> {
        self.submit(
            env,
            move |engine| engine.export_model(&PathBuf::from(dir), weight_dtype(dtype.as_deref())?),
            |()| (),
        )
    }

    /// Writes the folder of an adapter as PEFT does; `base` is what its configuration calls the model.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn export_adapter<'env>(&self, env: &'env Env, dir: String, base: String) -> napi::Result<Object<'env>> {
        self.submit(env, move |engine| engine.export_adapter(&PathBuf::from(dir), Some(&base)), |()| ())
    }

    /// Ends the computation in progress with `ARL_INTERRUPTED`; the weights stay as before it.
    #[napi]
    pub fn interrupt(&self) {
        self.interrupt.store(true, Ordering::Relaxed);
    }

    /// Ends the thread and frees the memory, once all jobs are done.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let done = self.submit(env, |_| Ok(()), |()| ());
        self.worker.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        done
    }
}
