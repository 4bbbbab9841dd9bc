"""Which Megatron options work with which router gradient: one table for code, docs and tests.

A rule names the situation, says why in one sentence that names the flag and the way out, and holds
a predicate over *settings*: Megatron's parsed arguments or a TransformerConfig, whose attributes
have the same names. The entry point checks the arguments before anything touches a GPU; ``attach``
checks the config for everybody else.
"""

import logging
import os
from typing import Any

from megatron_default_moe.errors import UserError
from megatron_default_moe.options.config import RouterGradientConfig
from megatron_default_moe.options.estimator_rules import ESTIMATOR_RULES
from megatron_default_moe.options.rule import Rule, weighs_unused, with_vectors
from megatron_default_moe.options.settings import Settings

logger = logging.getLogger(__name__)


LAYERS_WITHOUT_A_STAGE = (
    "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers are all the layers"
    " that Megatron builds when no stage is left between them: drop both, or raise"
    " --pipeline-model-parallel-size"
)
_TO_TOPK = "or train with --moe-router-gradient topk"

RULES: tuple[Rule, ...] = (
    *ESTIMATOR_RULES,
    Rule(
        "no --num-experts",
        "refused",
        "--num-experts is missing: a router gradient needs a Mixture-of-Experts model, for example"
        " --num-experts 8 --moe-router-topk 1",
        lambda s: not s.experts,
        topk_too=True,
    ),
    Rule(
        "softmax gate without --moe-router-pre-softmax",
        "refused",
        "--moe-router-pre-softmax is needed: without it the softmax is over the chosen experts"
        " only, and the others have no probability that a default vector could be weighted with",
        lambda s: s.score == "softmax" and not s.moe_router_pre_softmax,
        only=weighs_unused,
    ),
    Rule(
        "--moe-router-score-function sigmoid or sqrtsoftplus with --moe-router-topk above 1",
        "refused",
        "--moe-router-score-function sigmoid and sqrtsoftplus normalise over the chosen experts"
        " when --moe-router-topk is above 1, which leaves the others without a probability: add"
        " --default-vector-normalized-gate, which normalises over all experts",
        lambda s: s.score != "softmax" and s.topk > 1 and not s.options.normalized_gate,
        only=with_vectors,
    ),
    Rule(
        "--moe-router-score-function sigmoid or sqrtsoftplus with --moe-router-topk 1",
        "warned",
        "--moe-router-score-function sigmoid and sqrtsoftplus do not sum to one over the experts:"
        " the default vectors may outweigh the chosen expert; with --default-vector-normalized-gate"
        " they sum to one",
        lambda s: s.score != "softmax" and s.topk == 1 and not s.options.normalized_gate,
        only=with_vectors,
    ),
    Rule(
        "--default-vector-normalized-gate with the softmax gate",
        "refused",
        "--default-vector-normalized-gate is only for sigmoid-type gates"
        " (--moe-router-score-function sigmoid or sqrtsoftplus): drop it, a softmax over all"
        " experts sums to one already",
        lambda s: s.options.normalized_gate and s.score == "softmax",
        topk_too=True,
    ),
    Rule(
        "--moe-router-load-balancing-type sinkhorn",
        "refused",
        "--moe-router-load-balancing-type sinkhorn weights experts by another function than the"
        " one it chooses them with: use aux_loss, seq_aux_loss or global_aux_loss",
        lambda s: "sinkhorn" in s.balancing,
    ),
    Rule(
        "--moe-router-load-balancing-type global_aux_loss",
        "noted",
        "--moe-router-load-balancing-type global_aux_loss acts as strongly as its"
        " --moe-aux-loss-coeff says, whatever the number of data-parallel ranks; in Megatron 0.19"
        " it acts 1/DP as strongly, which --no-moe-global-aux-loss-exact keeps (for a coefficient"
        " that was tuned with it)",
        # Arguments only, so that it is said once.
        lambda s: (
            s.num_experts and "global_aux_loss" in s.balancing and s.options.global_aux_loss_exact
        ),
        topk_too=True,
    ),
    Rule(
        "--no-moe-global-aux-loss-exact",
        "warned",
        "--no-moe-global-aux-loss-exact leaves global_aux_loss 1/DP as strong as its"
        " --moe-aux-loss-coeff says, as Megatron 0.19 does: with more than one data-parallel rank"
        " multiply the coefficient by their number, or drop the flag",
        lambda s: (
            s.num_experts
            and "global_aux_loss" in s.balancing
            and not s.options.global_aux_loss_exact
        ),
        topk_too=True,
    ),
    Rule(
        "--moe-apply-probs-on-input",
        "refused",
        "--moe-apply-probs-on-input makes an expert return E(p x) instead of p E(x), from which no"
        " mean output can be taken: drop the flag",
        lambda s: s.moe_apply_probs_on_input,
    ),
    Rule(
        "--moe-router-topk equal to --num-experts",
        "warned",
        "--moe-router-topk equals --num-experts: every expert is active and the default vectors"
        " are never used",
        lambda s: s.experts and s.topk == s.experts,
        only=with_vectors,
    ),
    Rule(
        "--moe-router-force-load-balancing or --moe-router-force-biased",
        "warned",
        "--moe-router-force-load-balancing and --moe-router-force-biased route at random, for"
        " benchmarks: the default vectors of such a run mean nothing",
        lambda s: s.moe_router_force_load_balancing or s.moe_router_force_biased is not None,
        only=with_vectors,
    ),
    Rule(
        "--default-vector-weighting uniform with FP8 or FP4",
        "warned",
        "--default-vector-weighting uniform divides expert outputs by small probabilities, which"
        " amplifies the rounding of FP8 and FP4: --default-vector-weighting router does not",
        lambda s: s.options.weighting == "uniform" and (s.fp8 or s.fp4),
        only=with_vectors,
    ),
    Rule(
        "--fp8-recipe delayed without NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1",
        "warned",
        "--fp8-recipe delayed (the default of --fp8-format) saves its scales as a pickle, which"
        " Transformer Engine 2.17 refuses to load: set NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1 for"
        " checkpoints that you trust, or this run cannot be resumed; --fp8-recipe tensorwise saves"
        " none",
        # Arguments only, so that it is said once.
        lambda s: (
            s.num_experts
            and s.fp8
            and s.fp8_recipe == "delayed"
            and s.environment("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE") != "1"
        ),
        topk_too=True,
    ),
    Rule(
        "--use-transformer-engine-op-fuser without NVTE_CUTEDSL_FUSED_GROUPED_MLP=1",
        "refused",
        "--use-transformer-engine-op-fuser takes gated experts only with"
        " NVTE_CUTEDSL_FUSED_GROUPED_MLP=1 in the environment, or Megatron stops when it builds"
        " them: set it, or drop the flag",
        # Arguments only: later, Megatron says so itself.
        lambda s: (
            s.use_transformer_engine_op_fuser
            and s.num_experts
            and (s.swiglu or s.quick_geglu)
            and s.environment("NVTE_CUTEDSL_FUSED_GROUPED_MLP") in (None, "0")
        ),
        topk_too=True,
    ),
    Rule(
        "--tensor-model-parallel-size above 1 without --sequence-parallel",
        "refused",
        "--sequence-parallel is needed with --tensor-model-parallel-size above 1: Megatron trains"
        " MoE layers with tensor parallelism only on split sequences",
        lambda s: (s.tensor_model_parallel_size or 1) > 1 and not s.sequence_parallel,
        topk_too=True,
    ),
    Rule(
        "--transformer-impl local with biases in experts on one rank",
        "refused",
        "--disable-bias-linear is needed with --transformer-impl local on one expert rank:"
        " Megatron's local experts add their bias in place there, which autograd refuses",
        lambda s: (
            s.transformer_impl == "local"
            and s.add_bias_linear
            and (s.expert_model_parallel_size or 1) == 1
            and (s.expert_tensor_parallel_size or s.tensor_model_parallel_size or 1) == 1
        ),
        topk_too=True,
    ),
    Rule(
        "--moe-token-dispatcher-type flex (DeepEP, HybridEP, NCCL-EP)",
        "refused",
        "--moe-token-dispatcher-type flex fills the experts' batches up with rows of its own, and"
        " what they hold has not been verified on a GPU with default vectors: use"
        f" --moe-token-dispatcher-type alltoall, {_TO_TOPK}",
        lambda s: s.moe_token_dispatcher_type == "flex",
    ),
    Rule(
        "--moe-expert-rank-capacity-factor or --moe-paged-stash",
        "refused",
        "--moe-expert-rank-capacity-factor and --moe-paged-stash repeat a step after an overflow"
        f" and have not been verified with default vectors: drop them, {_TO_TOPK}",
        lambda s: s.moe_expert_rank_capacity_factor is not None or s.moe_paged_stash,
    ),
    Rule(
        "--overlap-moe-expert-parallel-comm with --default-vector-order before-use",
        "refused",
        "--overlap-moe-expert-parallel-comm hides communication behind the work of another"
        " micro-batch, and --default-vector-order before-use adds some that it cannot hide: use"
        " --default-vector-order after-use, or drop the flag",
        lambda s: s.overlap_moe_expert_parallel_comm and s.options.order == "before-use",
        only=with_vectors,
    ),
    Rule(
        "--cuda-graph-modules other than attn, mlp, and moe_router moe_preprocess together",
        "refused",
        "--cuda-graph-modules takes attn and mlp and, with --cuda-graph-impl transformer_engine,"
        " moe_router and moe_preprocess together: any other graph around the router hides from the"
        " rest of the layer what was routed",
        lambda s: s.graphs_hide_routing,
        topk_too=True,
    ),
    Rule(
        "--transformer-impl inference_optimized",
        "refused",
        "--transformer-impl inference_optimized replaces the router and never forms the"
        " probabilities of all experts: use transformer_engine or local",
        lambda s: s.transformer_impl == "inference_optimized",
        topk_too=True,
    ),
    Rule(
        "--moe-use-upcycling",
        "refused",
        "--moe-use-upcycling builds a dense model first, which Megatron's model config cannot do:"
        " upcycle with Megatron's own script, then load with --default-vector-from-baseline",
        lambda s: s.moe_use_upcycling,
        topk_too=True,
    ),
    Rule(
        "--init-model-with-meta-device without a checkpoint",
        "refused",
        "--init-model-with-meta-device leaves the weights of norms and routers at whatever the"
        " memory holds until a checkpoint is loaded: drop it for a new run",
        # Arguments only: a TransformerConfig does not know of a checkpoint.
        lambda s: (
            s.init_model_with_meta_device
            and s.num_experts
            and not (s.load or s.pretrained_checkpoint)
        ),
        topk_too=True,
    ),
    Rule(
        "--init-model-with-meta-device with --default-vector-init gaussian",
        "refused",
        "--init-model-with-meta-device builds the model without memory, where the random numbers of"
        " --default-vector-init gaussian have no place: use --default-vector-init zeros (the"
        " checkpoint's own vectors are loaded either way), or drop --init-model-with-meta-device",
        lambda s: s.init_model_with_meta_device and s.options.init == "gaussian",
    ),
    Rule(
        "--freeze-all-layers",
        "refused",
        "--freeze-all-layers does not reach the models of Megatron's builder, and every layer would"
        " be trained: drop it; to evaluate and train nothing, --skip-train",
        lambda s: s.freeze_all_layers,
        topk_too=True,
    ),
    Rule(
        "--spec other than megatron_default_moe default_moe_spec",
        "refused",
        "--spec names layers of its own, which would train without default vectors: drop it,"
        f" {_TO_TOPK}; in a script of your own, wrap the spec with model.with_default_moe",
        lambda s: s.spec and s.spec != ["megatron_default_moe", "default_moe_spec"],
    ),
    Rule(
        "--yaml-cfg",
        "refused",
        "--yaml-cfg bypasses Megatron's arguments: put the same flags into a file for --config",
        lambda s: s.yaml_cfg,
        topk_too=True,
    ),
    Rule(
        "--hybrid-layer-pattern (hybrid models)",
        "refused",
        "--hybrid-layer-pattern: hybrid models are not supported yet; use a GPT model",
        lambda s: s.hybrid_layer_pattern,
        topk_too=True,
    ),
    Rule(
        "--heterogeneous-layers-config-path",
        "refused",
        "--heterogeneous-layers-config-path: heterogeneous models have no MoE layers that could"
        " carry default vectors; drop the flag",
        lambda s: s.heterogeneous_layers_config_path or s.heterogeneous_layers_config_encoded_json,
        topk_too=True,
    ),
    Rule(
        "--use-megatron-fsdp or --use-torch-fsdp2",
        "refused",
        "--use-megatron-fsdp and --use-torch-fsdp2 have not been verified with default vectors:"
        f" use --use-distributed-optimizer, {_TO_TOPK}",
        lambda s: s.use_megatron_fsdp or s.use_torch_fsdp2,
    ),
    Rule(
        "--perform-rl-step",
        "refused",
        "--perform-rl-step: reinforcement learning is not supported by this entry point",
        lambda s: s.perform_rl_step,
        topk_too=True,
    ),
    Rule(
        "--sft, --fim-data, --dataloader-inter-document-masking or --logits-load-dir",
        "refused",
        "--sft, --fim-data, --dataloader-inter-document-masking and --logits-load-dir need"
        " Megatron's own pretrain_gpt.py, patched as patches/README.md says or with --spec"
        " megatron_default_moe default_moe_spec: this entry feeds plain pretraining data",
        lambda s: s.sft or s.fim_data or s.dataloader_inter_document_masking or s.logits_load_dir,
        topk_too=True,
        own_entry_only=True,
    ),
    Rule(
        "--moe-router-topk above --num-experts",
        "refused",
        "--moe-router-topk is above --num-experts: a token cannot use more experts than there are,"
        " lower it",
        lambda s: s.experts and s.topk > s.experts,
        topk_too=True,
    ),
    Rule(
        "--moe-layer-freq with another number of layers than --num-layers",
        "refused",
        "--moe-layer-freq names another number of layers than --num-layers: write one 0 or 1 for"
        " each layer",
        lambda s: isinstance(s.moe_layer_freq, list) and len(s.moe_layer_freq) != s.num_layers,
        topk_too=True,
    ),
    Rule(
        "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers without a stage"
        " between them",
        "refused",
        LAYERS_WITHOUT_A_STAGE,
        lambda s: s.layers_without_a_stage,
        topk_too=True,
    ),
    Rule(
        "--num-distributed-optimizer-instances above 1",
        "refused",
        "--num-distributed-optimizer-instances above 1 needs CUDA streams and einops in Megatron"
        " and is not tested here: drop it, which divides the optimizer's state over all"
        " data-parallel ranks",
        lambda s: (s.num_distributed_optimizer_instances or 1) > 1,
        topk_too=True,
    ),
    Rule(
        "--lr-warmup-iters not below --lr-decay-iters",
        "refused",
        "--lr-warmup-iters must be below --lr-decay-iters (which is --train-iters unless given):"
        " shorten the warm-up or train longer",
        lambda s: s.train_iters and (s.lr_warmup_iters or 0) >= (s.lr_decay_iters or s.train_iters),
        topk_too=True,
    ),
    Rule(
        "--use-checkpoint-args",
        "warned",
        "--use-checkpoint-args restores Megatron's own options only: give the --default-vector-*"
        " flags of the run again",
        lambda s: s.use_checkpoint_args,
    ),
)


def check(
    source: Any, options: RouterGradientConfig, own_entry: bool = True, warn: bool = True
) -> None:
    """Refuse what does not work, warn of what may surprise, and note what is done otherwise.

    Args:
        source: Megatron's parsed arguments or a TransformerConfig.
        options: the package's options.
        own_entry: whether this package's own entry asks, or Megatron's (patched) script.
        warn: whether to warn and note, which rank 0 does.

    Raises:
        UserError: the first refused situation, as one sentence.
    """
    settings = Settings(source, options)
    concerned = [rule for rule in RULES if rule.concerns(options)]
    found = [
        rule
        for rule in concerned
        if rule.applies(settings) and (own_entry or not rule.own_entry_only)
    ]
    for rule in found:
        if rule.verdict == "refused":
            raise UserError(rule.sentence)
    if warn and os.environ.get("RANK", "0") == "0":
        for rule in found:
            logger.warning(rule.sentence)


def markdown() -> str:
    """Return the table for the documentation."""
    rows = [
        f"| {rule.situation} | {rule.verdict}{rule.estimators} | {rule.sentence} |"
        for rule in RULES
    ]
    return "\n".join(["| situation | verdict | why, and what to do |", "|---|---|---|", *rows])
