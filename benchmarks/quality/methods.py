"""The methods: how each puts LoRA on a model and steps it. Everything else is the same for all.

Peers are PEFT's own. Ours are built as `grit_core.training_run` builds them.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from torch import Tensor, nn

from benchmarks.quality.subject import Subject
from grit_core.curvature.capture import CurvatureCapture, LayerSums
from grit_core.curvature.initialization import GradientInitialization
from grit_core.models.inventory import inventory_of
from grit_core.models.pretrained import known_warnings_ignored
from grit_core.models.vlm_adapter import (
    ADAPTER,
    adapted_layers,
    build_capture,
    build_optimizer,
    inject_lora,
    lora_config_of,
    lora_layers,
)
from grit_core.optimizer import GRITOptimizer
from grit_core.plan import AdaptationPlan, plan_adaptation

WARMUP: Final = 0.05


@dataclass(kw_only=True)
class Arm:
    """One method on one fresh model."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    plan: AdaptationPlan
    capture: CurvatureCapture | None = None
    penalty: Callable[[], Tensor] | None = None
    """Added to the loss before it goes backward; never reported."""

    after_step: Callable[[int], None] | None = None
    start: GradientInitialization | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that train."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def observing(self, num_tokens: int) -> AbstractContextManager[dict[str, LayerSums] | None]:
        """Observe the coming step's curvature, where that is due."""
        due = isinstance(self.optimizer, GRITOptimizer) and self.optimizer.observation_due()
        if self.capture is None or not due:
            return nullcontext()
        return self.capture.observing(gradient_scale=num_tokens, num_label_tokens=num_tokens)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A name, what to show for it, and how to build it."""

    title: str
    build: Callable[[Subject, float, int], Arm]
    learning_rate: float
    """Where the sweep begins; it moves until the best is inside."""

    ours: bool = False
    ablation: bool = False
    """Neither a peer nor a proposal: it tells where a difference comes from."""

    peer: bool = False
    """What somebody else proposes instead of LoRA with AdamW."""

    trainer: bool = False
    """Run by transformers' Trainer."""

    extra_passes: int = 0
    """Backward passes before the first step, counted as steps."""


def plan_of(subject: Subject, model: nn.Module, changes: Mapping[str, Any]) -> AdaptationPlan:
    """Plan the subject's layers, with some settings changed; keys with a dot are per modality."""
    config = deepcopy(subject.config)
    for name, value in changes.items():
        if name.startswith("each."):
            for modality in config.modalities().values():
                setattr(modality, name.removeprefix("each."), value)
        else:
            setattr(config, name, value)
    return plan_adaptation(config, inventory_of(model))


def lora(subject: Subject, seed: int) -> tuple[PeftModel, AdaptationPlan]:
    """PEFT's LoRA as the plan says, A from the seed alone."""
    base = subject.base_model()
    plan = plan_of(subject, base, {})
    return inject_lora(base, plan, seed=seed), plan


def _adamw(subject: Subject, rate: float, seed: int) -> Arm:
    model, plan = lora(subject, seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Arm(
        model=model, plan=plan, optimizer=torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    )


def _adamw_gradient(subject: Subject, rate: float, seed: int) -> Arm:
    arm = _adamw(subject, rate, seed)
    arm.start = GradientInitialization(adapted_layers(arm.model, arm.plan))
    return arm


def _lora_plus(subject: Subject, rate: float, seed: int, *, ratio: float) -> Arm:
    model, plan = lora(subject, seed)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio, weight_decay=0.0
    )
    return Arm(model=model, plan=plan, optimizer=optimizer)


def _riemannian(subject: Subject, rate: float, seed: int) -> Arm:
    model, plan = lora(subject, seed)
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=rate, weight_decay=0.0)
    return Arm(model=model, plan=plan, optimizer=optimizer)


def _dora(subject: Subject, rate: float, seed: int) -> Arm:
    plan = plan_of(subject, subject.base_model(), {})
    config = lora_config_of(plan)
    config.use_dora = True
    with known_warnings_ignored():
        model = get_peft_model(subject.base_model(), config)
    _same_start(model, subject, seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Arm(
        model=model, plan=plan, optimizer=torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    )


def _same_start(model: PeftModel, subject: Subject, seed: int) -> None:
    """Give A the values that plain LoRA starts from."""
    reference = lora_layers(lora(subject, seed)[0])
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A[ADAPTER].weight.copy_(reference[name].lora_A[ADAPTER].weight)


def _adalora(subject: Subject, rate: float, seed: int) -> Arm:
    plan = plan_of(subject, subject.base_model(), {})
    plain = lora_config_of(plan)
    steps = subject.num_steps
    rank = plain.r
    config = AdaLoraConfig(
        init_r=rank + rank // 2,
        target_r=rank,
        tinit=steps // 10,
        tfinal=steps // 4,
        deltaT=5,
        total_step=steps,
        lora_alpha=_scaled(plain, rank),
        target_modules=plain.target_modules,
        exclude_modules=plain.exclude_modules,
    )
    torch.manual_seed(seed)
    with known_warnings_ignored():
        model = get_peft_model(subject.base_model(), config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    triples = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ("lora_A" in name or "lora_B" in name)
    ]

    def orthogonality() -> Tensor:
        """What AdaLoraModel.forward adds to a loss it has computed itself."""
        terms = []
        for matrix in triples:
            wide = matrix.shape[0] < matrix.shape[1]
            product = matrix @ matrix.T if wide else matrix.T @ matrix
            terms.append(torch.linalg.norm(product - torch.eye(len(product))))
        return config.orth_reg_weight * torch.stack(terms).mean()

    def update(step: int) -> None:
        model.base_model.update_and_allocate(step)  # type: ignore[operator]  # PEFT forwards it

    return Arm(
        model=model, plan=plan, optimizer=optimizer, penalty=orthogonality, after_step=update
    )


def _scaled(plain: LoraConfig, rank: int) -> int:
    """AdaLoRA divides alpha by the layer's present rank; as plain LoRA at the target rank."""
    return round(plain.lora_alpha / plain.r * rank)


def _grit(subject: Subject, rate: float, seed: int, **changes: Any) -> Arm:
    base = subject.base_model()
    plan = plan_of(subject, base, changes)
    model = inject_lora(base, plan, seed=seed)
    config = deepcopy(subject.config)
    for name, value in plan.settings.items():
        setattr(config, name, value)
    optimizer = build_optimizer(
        model, plan, config, total_steps=subject.num_steps, lr=rate, weight_decay=0.0
    )
    start = None
    if config.initialization == "gradient":
        start = GradientInitialization(optimizer.layers)
    return Arm(
        model=model, plan=plan, optimizer=optimizer, capture=build_capture(model, plan), start=start
    )


def _of(build: Callable[..., Arm], **fixed: Any) -> Callable[[Subject, float, int], Arm]:
    return lambda subject, rate, seed: build(subject, rate, seed, **fixed)


def _budgeted(subject: Subject, rate: float, seed: int) -> Arm:
    """A quarter of the largest modality's directions at the start, half of them at the end."""
    plan = plan_of(subject, subject.base_model(), {})
    largest = max(sum(x.rank for x in plan.of(m)) for m in subject.config.modalities())
    return _grit(
        subject,
        rate,
        seed,
        **{"each.enable_projection": True},
        projection_budget_start=largest // 4,
        projection_budget_end=largest // 2,
        projection_update_freq=_PROJECTION_FREQ,
    )


_PROJECTION_FREQ: Final = 20
_UNBOUND: Final = 1_000_000
_KAIMING: Final = {"initialization": "kaiming"}

METHODS: Final[dict[str, Method]] = {
    "adamw": Method(title="LoRA + AdamW", build=_adamw, learning_rate=5.6e-3),
    "trainer": Method(
        title="LoRA + AdamW, HF Trainer", build=_adamw, learning_rate=5.6e-3, trainer=True
    ),
    "lora_plus": Method(
        title="LoRA+ (ratio 16)", build=_of(_lora_plus, ratio=16.0), learning_rate=1e-3, peer=True
    ),
    "riemannian": Method(
        title="Riemannian (PEFT)", build=_riemannian, learning_rate=5.6e-3, peer=True
    ),
    "adalora": Method(title="AdaLoRA", build=_adalora, learning_rate=1e-2, peer=True),
    "dora": Method(title="DoRA", build=_dora, learning_rate=5.6e-3, peer=True),
    "ekfac": Method(
        title="GRIT ekfac", build=_grit, learning_rate=5.6e-3, ours=True, extra_passes=2
    ),
    "kfac": Method(
        title="GRIT kfac",
        build=_of(_grit, step_rule="kfac"),
        learning_rate=5.6e-3,
        ours=True,
        extra_passes=2,
    ),
    "gauge": Method(
        title="GRIT gauge",
        build=_of(_grit, step_rule="gauge", projection_update_freq=_PROJECTION_FREQ),
        learning_rate=5.6e-3,
        ours=True,
        extra_passes=2,
    ),
    "reproject": Method(
        title="GRIT ekfac, reprojected",
        build=_of(
            _grit,
            **{"each.enable_projection": True},
            projection_schedule="constant",
            projection_budget_start=_UNBOUND,
            projection_update_freq=_PROJECTION_FREQ,
        ),
        learning_rate=5.6e-3,
        ours=True,
        extra_passes=2,
    ),
    "budget": Method(
        title="GRIT ekfac, budget 1/4 to 1/2",
        build=_budgeted,
        learning_rate=5.6e-3,
        ours=True,
        extra_passes=2,
    ),
    "ekfac_kaiming": Method(
        title="GRIT ekfac, random start",
        build=_of(_grit, **_KAIMING),
        learning_rate=5.6e-3,
        ablation=True,
    ),
    "adamw_gradient": Method(
        title="LoRA + AdamW, gradient start",
        build=_adamw_gradient,
        learning_rate=5.6e-3,
        ablation=True,
        extra_passes=2,
    ),
    "paper": Method(
        title="rule of the released GRIT code",
        build=_of(_grit, step_rule="paper", **_KAIMING),
        learning_rate=5.6e-3,
    ),
}
"""In the order in which they are shown."""
