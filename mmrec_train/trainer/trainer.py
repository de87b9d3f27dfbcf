"""The training loop over `deepspeed.initialize`, to be read from top to bottom."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mmrec_train.config import RunConfig, check_machine, check_world, deepspeed_config, runs_on_gpu, save_config
from mmrec_train.config.stream import cache_settings, stream_settings, training_data, validation_sets
from mmrec_train.data import Chunk, Encoder, LaneLoader, load_tokenizer
from mmrec_train.data.delivery import Delivery
from mmrec_train.data.lanes import NO_LABEL
from mmrec_train.errors import UserError
from mmrec_train.model import MemoryState, MMRecForCausalLM
from mmrec_train.monitoring import Console
from mmrec_train.trainer import checkpoint
from mmrec_train.trainer.clipping import GradientClipper
from mmrec_train.trainer.distributed import World, check_agreement, join
from mmrec_train.trainer.optimizer import build_optimizer, learning_rate, parameter_groups
from mmrec_train.trainer.reporting import Reporter
from mmrec_train.trainer.stopping import StopRequest
from mmrec_train.trainer.validation import validate

# what must not differ between a checkpoint and the run that goes on from it
SHAPE_KEYS = [
    "vocab_size",
    "hidden_dim",
    "num_layers",
    "num_heads",
    "num_memories",
    "memory_slots",
    "segment_len",
    "short_window",
    "ffn_dim",
    "gate",
    "read",
    "memory_across_documents",
    "tie_word_embeddings",
]


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.fit` ended: after which step, and whether because it was asked to stop."""

    step: int
    stopped: bool


class Trainer:
    """Trains MM-Rec as a `RunConfig` says, in a run folder of its own.

    The constructor finds what is wrong with configuration, machine and data, and raises UserError, before a process
    group exists or a GPU is touched. `fit` does the rest.

    Args:
        config: The run.
        resume: "auto" (the newest complete checkpoint of the run folder, if any), "never", or a path.
    """

    def __init__(self, config: RunConfig, resume: str = "auto"):
        self.config, self.resume = config, resume
        self.world = World.from_environment()
        self.run_dir = Path(config.run_dir)
        check_machine(config)
        self.accumulation = check_world(config, self.world.size)
        # shards are checksummed once, not by every rank
        self.train_data = training_data(config, verify=self.world.is_main)
        self.validation_sets = (
            validation_sets(config, self.train_data, verify=self.world.is_main) if config.train.validate_every else {}
        )
        self.tokenizer = load_tokenizer(config.data.path, cache_settings(config))
        manifest = self.train_data.manifest
        self.model_config = config.model.to_model_config(manifest.vocab_size)
        self.model_config.bos_token_id, self.model_config.eos_token_id = manifest.bos_id, manifest.eos_id
        self.deepspeed_config = deepspeed_config(config, world_size=self.world.size, model_config=self.model_config)

    def fit(self) -> Outcome:
        """Trains to the last step, or until a stop signal; writes checkpoints, metrics and the report."""
        train = self.config.train
        with ExitStack() as stack:
            self._join(stack)
            self._build_engine()
            self._restore()
            self.delivery = stack.enter_context(Delivery(self.loader, self.device))
            reporter = self._start_reporting(stack)
            stop = stack.enter_context(StopRequest())
            stopped = False

            if self.step == 0:
                self._validate(reporter)
            window_start, window_step = time.perf_counter(), self.step
            while self.step < train.steps and not stopped:
                result = self._train_step()
                self.step += 1
                last = self.step == train.steps
                if self.step % self.config.logging.every == 0 or last:
                    get_accelerator().synchronize()
                    seconds = (time.perf_counter() - window_start) / (self.step - window_step)
                    self._log(result, seconds, self.delivery.waits(), reporter)
                stopped = stop.agreed(self.device)
                pause_start = time.perf_counter()
                if train.validate_every and (self.step % train.validate_every == 0 or last):
                    self._validate(reporter)
                if self.step % self.config.checkpoint.every == 0 or last or stopped:
                    self._save(reporter)
                # validation and checkpoints do not count as step time
                window_start += time.perf_counter() - pause_start
                if self.step % self.config.logging.every == 0:
                    window_start, window_step = time.perf_counter(), self.step
                if reporter:
                    reporter.advance(self.step)

            if not stopped:
                self._finish(reporter)
        return Outcome(self.step, stopped)

    def _train_step(self) -> "StepResult":
        """One optimizer step: every micro-batch of lanes goes on from its own memories, chunk by chunk of its window.

        Gradients end where a chunk begins (truncated BPTT). Every token of the step has the same weight; those after a
        finite stream's end have none.
        """
        rate = learning_rate(
            self.step, self.config.train.steps, self.config.optimizer.learning_rate, self.config.schedule
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        losses, counted, iterations, residuals = [], [], [], []
        for index, window in enumerate(self._next_windows()):
            for chunk in window.split(self.config.data.chunk_len):
                output = self.engine(
                    input_ids=chunk.input_ids,
                    shift_labels=chunk.labels,
                    reset=chunk.reset,
                    memory_states=self.memories[index],
                )
                part = (chunk.labels != NO_LABEL).float().mean()  # of the chunk's tokens that count: 1, as a rule
                loss = output.loss * part
                self.engine.backward(loss)  # divides by the number of micro-batches and chunks
                self.memories[index] = tuple(state.detach() for state in output.memory_states)
                self.engine.step()  # moves the parameters after the last of them
                losses.append(loss.detach())
                counted.append(part)
                iterations.append(output.solver_iterations.mean())
                residuals.append(output.solver_residual.amax())
        return StepResult(
            torch.stack(losses).sum(),
            torch.stack(counted).sum(),
            torch.stack(iterations).mean(),
            torch.stack(residuals).amax(),
            rate,
        )

    def _next_windows(self) -> list[Chunk]:
        try:
            return self.delivery.next_step()
        except StopIteration:
            raise UserError(
                f"all sources are exhausted after step {self.step}; raise data.sources.NAME.epochs, or end the run "
                f"there by train.steps={self.step}"
            ) from None

    def _validate(self, reporter: Reporter | None) -> None:
        """A record of the losses on all validation sets; a collective call."""
        if not self.validation_sets:
            return
        record = validate(
            self.engine,
            self.validation_sets,
            self.world,
            self.device,
            chunk_len=self.config.data.chunk_len,
            micro_batch_size=self.config.train.micro_batch_size,
        )
        if reporter:
            reporter.log({"step": self.step, **record})

    def _log(self, result: "StepResult", step_seconds: float, waits: list[float], reporter: Reporter | None) -> None:
        """One record of the step just done; a collective call. waits: seconds, for each step since the last record."""
        sums = torch.stack([result.loss, result.counted, result.solver_iterations]).double()
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        loss, counted, iterations = sums.tolist()
        own = [result.solver_residual.item(), _peak_memory(), sum(waits) / len(waits), max(waits)]
        extremes = torch.tensor(own, dtype=torch.float64).to(self.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        residual, peak_memory, mean_wait, longest_wait = extremes.tolist()
        if reporter:
            reporter.log(
                {
                    "step": self.step,
                    "tokens": sum(self.delivery.consumed.values()),
                    "loss": loss / counted,
                    "learning_rate": result.learning_rate,
                    **self.clipper.norms,
                    "step_seconds": step_seconds,
                    "data_wait_seconds": mean_wait,
                    "data_wait_max_seconds": longest_wait,
                    "tokens_per_second": self.config.tokens_per_step / step_seconds,
                    "peak_memory_bytes": int(peak_memory),
                    "solver_iterations": iterations / self.world.size,
                    "solver_residual": residual,
                    "skipped": self.engine.skipped_steps,
                    **self._by_source(),
                }
            )

    def _by_source(self) -> dict[str, float]:
        """What has been read of each source, where there are several: tokens, and passes over it."""
        sources = self.train_data.sources
        if len(sources) == 1:
            return {}
        record: dict[str, float] = {}
        for name, tokens in self.delivery.consumed.items():
            record[f"source/{name}/tokens"] = tokens
            record[f"source/{name}/epochs"] = tokens / sources[name].num_tokens
        return record

    def _save(self, reporter: Reporter | None) -> None:
        run_state = {
            "step": self.step,
            "identity": self._identity(),
            "data": self.delivery.state_dict(),
            "wandb_run_id": reporter.wandb_run_id if reporter else None,
        }
        path = checkpoint.save(
            self.run_dir,
            self.engine,
            self.world,
            step=self.step,
            run_state=run_state,
            memories=self.memories,
            tokenizer=self.tokenizer,
            keep_last=self.config.checkpoint.keep_last,
        )
        if reporter:
            reporter.say(f"checkpoint: {path}")

    def _finish(self, reporter: Reporter | None) -> None:
        sample = self._sample()
        if reporter:
            reporter.finish(sample)

    @torch.no_grad()
    def _sample(self) -> str:
        """A continuation of the prompt. Every rank takes part: under ZeRO-3 each holds a part of every weight."""
        settings = self.config.logging
        if not settings.sample_tokens:
            return ""
        (prompt,) = Encoder(self.tokenizer)([settings.sample_prompt])
        self.engine.eval()
        torch.manual_seed(self.config.train.seed)  # the same draws on every rank
        tokens = self.engine.module.generate(
            torch.from_numpy(prompt).unsqueeze(0).to(self.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=self.device),
            max_new_tokens=settings.sample_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
            pad_token_id=self.model_config.eos_token_id,
            synced_gpus=self.world.size > 1,
        )
        return self.tokenizer.decode(tokens[0, 1:], skip_special_tokens=True)

    # ---- setting up

    def _join(self, stack: ExitStack) -> None:
        """Joins the other ranks; finds the checkpoint to go on from, on rank 0, for all of them."""
        self.device = join(self.world, on_gpu=runs_on_gpu(self.config))
        stack.callback(dist.destroy_process_group)
        check_agreement(self.world, self._settings())
        found: list[Any] = [None]
        if self.world.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.console = stack.enter_context(Console(self.run_dir))
            try:
                found = [self._find_checkpoint()]
            except UserError as error:  # the others must not wait for this rank
                found = [error]
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], UserError):
            raise found[0]
        self.resume_from = found[0]

    def _find_checkpoint(self) -> Path | None:
        path = checkpoint.find(self.run_dir, self.resume, self.console.print)
        if path is not None:
            checkpoint.check_identity(path, checkpoint.read_run_state(path)["identity"], self._identity())
        return path

    def _build_engine(self) -> None:
        train = self.config.train
        torch.manual_seed(train.seed)  # the same initial weights on every rank
        model = MMRecForCausalLM(self.model_config)
        every = train.activation_checkpointing
        model.model.checkpoint_every = every if isinstance(every, int) else {"none": 0, "full": 1}[every]
        torch.manual_seed(train.seed + 1 + self.world.rank)  # dropout of its own on each
        groups = parameter_groups(model, self.config.optimizer)
        components = [group["component"] for group in groups]
        offloaded = self.deepspeed_config["zero_force_ds_cpu_optimizer"]
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(groups, self.config.optimizer, offloaded=offloaded),
            config=self.deepspeed_config,
        )
        self.clipper = GradientClipper(self.engine, components, self.config.optimizer.clip)
        self.engine.train()

    def _restore(self) -> None:
        """Sets step, data position and memories: those of the checkpoint, or those of a new run."""
        self.step, self.wandb_run_id = 0, None
        self.loader = LaneLoader(
            self.train_data,
            stream_settings(self.config),
            num_lanes=self.config.train.global_batch_size,
            chunk_len=self.config.data.chunk_len,
            micro_batch_size=self.config.train.micro_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.memories = self._empty_memories()
        if self.resume_from is not None:
            state = checkpoint.read_run_state(self.resume_from)
            self.step, self.wandb_run_id = state["step"], state["wandb_run_id"]
            self.loader.load_state_dict(state["data"], allow_change=self.config.data.allow_change)
            self.memories = checkpoint.restore(self.resume_from, self.engine, self.world, self.memories)

    def _start_reporting(self, stack: ExitStack) -> Reporter | None:
        if not self.world.is_main:
            return None
        save_config(self.config, self.run_dir / "config.yaml")
        reporter = Reporter(
            self.config,
            self.model_config,
            self.world,
            console=self.console,
            first_step=self.step,
            wandb_run_id=self.wandb_run_id,
        )
        return stack.enter_context(reporter)

    def _empty_memories(self) -> list[tuple[MemoryState, ...]]:
        """Memories before any token, one tuple of layers for each of this rank's micro-batches of a step."""
        batch = self.config.train.micro_batch_size
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.config.train.precision]
        return [
            tuple(
                MemoryState.empty(self.model_config, batch, dtype, self.device)
                for _ in range(self.model_config.num_layers)
            )
            for _ in range(self.accumulation)
        ]

    def _settings(self) -> dict[str, Any]:
        """All that decides what this rank does."""
        datasets = {"training": self.train_data, **self.validation_sets}
        return {
            **self.config.model_dump(),
            "DeepSpeed": self.deepspeed_config,
            "documents": {
                name: {source.name: source.fingerprint for source in dataset.sources.values()}
                for name, dataset in datasets.items()
            },
        }

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to fit this run, besides the data stream (the loader checks that)."""
        zero = self.deepspeed_config.get("zero_optimization", {})
        return {
            **{f"model.{key}": getattr(self.model_config, key) for key in SHAPE_KEYS},
            "tokenizer": self.train_data.manifest.tokenizer_fingerprint,
            "number of ranks": self.world.size,
            "train.micro_batch_size": self.config.train.micro_batch_size,
            "train.precision": self.config.train.precision,
            "ZeRO stage": zero.get("stage", 0),
            "optimizer offload": zero.get("offload_optimizer", {}).get("device", "none"),
            "parameter offload": zero.get("offload_param", {}).get("device", "none"),
        }


@dataclass(frozen=True)
class StepResult:
    """One step on this rank, as tensors but for the last.

    The sum of the chunks' losses, each weighted by its part of tokens that count, and the sum of these parts; mean
    solver iterations, largest residual; learning rate.
    """

    loss: Tensor
    counted: Tensor
    solver_iterations: Tensor
    solver_residual: Tensor
    learning_rate: float


def _peak_memory() -> float:
    """Bytes: the largest GPU allocation since the last call, or the memory this process holds on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return float(psutil.Process().memory_info().rss)
    peak = float(accelerator.max_memory_allocated())
    accelerator.reset_peak_memory_stats()
    return peak
