"""The rows of the support table that are about estimators other than topk and default."""

from megatron_default_moe.options.rule import Rule, beyond_default, chooses, named

ESTIMATOR_RULES: tuple[Rule, ...] = (
    Rule(
        "another gate than softmax with an estimator other than topk and default",
        "refused",
        "--moe-router-score-function: only --moe-router-gradient topk and default take sigmoid and"
        " sqrtsoftplus; drop the flag, which leaves softmax (remoe has a gate of its own)",
        lambda s: s.score != "softmax" or s.options.normalized_gate,
        only=beyond_default,
    ),
    Rule(
        "--moe-router-gradient sparsemixer with --moe-router-topk above 1",
        "refused",
        "--moe-router-gradient sparsemixer draws one expert per token: set --moe-router-topk 1, or"
        " use sparsemixer-v2, which draws up to two",
        lambda s: s.topk > 1,
        only=named("sparsemixer"),
    ),
    Rule(
        "--moe-router-gradient sparsemixer-v2 with --moe-router-topk above 2",
        "refused",
        "--moe-router-gradient sparsemixer-v2 draws at most two experts per token: set"
        " --moe-router-topk 1 or 2",
        lambda s: s.topk > 2,
        only=named("sparsemixer-v2"),
    ),
    Rule(
        "an own choice of experts with a router that chooses otherwise",
        "refused",
        "--moe-router-gradient sparsemixer, sparsemixer-v2 and remoe, and --moe-loss-free-bias,"
        " choose the experts themselves, without --moe-router-fusion, --moe-enable-routing-replay,"
        " --moe-router-num-groups, --moe-router-force-biased and the balancing types sinkhorn and"
        " quantile_balancing: drop those, or the estimator",
        lambda s: (
            s.options.chooses
            and (
                s.moe_router_fusion
                or s.moe_enable_routing_replay
                or s.moe_router_num_groups
                or s.moe_router_group_topk
                or {"sinkhorn", "quantile_balancing"} & set(s.balancing)
            )
        ),
        topk_too=True,
    ),
    Rule(
        "--moe-loss-free-bias without a softmax over all experts",
        "refused",
        "--moe-loss-free-bias is the bias beside a softmax over all experts: add"
        " --moe-router-pre-softmax, or take Megatron's own --moe-router-enable-expert-bias, which"
        " is for --moe-router-score-function sigmoid",
        lambda s: (
            s.options.loss_free_bias is not None
            and (s.score != "softmax" or not s.moe_router_pre_softmax)
        ),
        topk_too=True,
    ),
    Rule(
        "--moe-loss-free-bias with sparsemixer, sparsemixer-v2 or remoe",
        "refused",
        "--moe-loss-free-bias moves a top-k, and sparsemixer, sparsemixer-v2 and remoe have none:"
        " drop one of the two",
        lambda s: s.options.loss_free_bias is not None,
        only=chooses,
    ),
    Rule(
        "--moe-router-gradient remoe with another balance loss",
        "refused",
        "--moe-router-gradient remoe has a balance loss of its own: set"
        " --moe-router-load-balancing-type none",
        lambda s: set(s.balancing) != {"none"},
        only=named("remoe"),
    ),
    Rule(
        "--moe-router-gradient remoe with capacity or padding for quantisation",
        "refused",
        "--moe-router-gradient remoe lets each token open as many experts as it wants, which"
        " --moe-expert-capacity-factor and --moe-router-padding-for-quantization do not allow for:"
        " drop them",
        lambda s: s.moe_expert_capacity_factor is not None or s.moe_router_padding_for_quantization,
        only=named("remoe"),
    ),
    Rule(
        "--moe-router-topk-scaling-factor with a gate of its own",
        "refused",
        "--moe-router-topk-scaling-factor scales Megatron's top-k, and sparsemixer, sparsemixer-v2"
        " and remoe have gates of their own: drop it",
        lambda s: s.moe_router_topk_scaling_factor,
        only=chooses,
    ),
    Rule(
        "--moe-router-gradient sparsemixer with --moe-shared-expert-overlap",
        "refused",
        "--moe-shared-expert-overlap adds the shared expert before sparsemixer scales the routed"
        " output: drop the flag",
        lambda s: s.moe_shared_expert_overlap,
        only=named("sparsemixer"),
    ),
    Rule(
        "--moe-router-gradient expert-group with --moe-pad-expert-input-to-capacity",
        "refused",
        "--moe-pad-expert-input-to-capacity fills the experts' batches up with rows whose groups"
        " are not known to --moe-router-gradient expert-group: drop the flag",
        lambda s: s.moe_pad_expert_input_to_capacity,
        only=named("expert-group"),
    ),
    Rule(
        "--expert-group-size above --num-experts",
        "refused",
        "--expert-group-size is above --num-experts: lower it",
        lambda s: s.experts and s.options.expert_group_size > s.experts,
        only=named("expert-group"),
    ),
    Rule(
        "--moe-router-gradient dense with --fp8-recipe delayed",
        "refused",
        "--fp8-recipe delayed keeps a history of what the experts saw, and --moe-router-gradient"
        " dense shows them every token: use another --fp8-recipe, for example tensorwise",
        lambda s: s.fp8 and s.fp8_recipe == "delayed",
        only=named("dense"),
    ),
    Rule(
        "an estimator other than topk and default with --overlap-moe-expert-parallel-comm or"
        " CUDA graphs of the router",
        "refused",
        "--overlap-moe-expert-parallel-comm and CUDA graphs that hold moe_router are for"
        " --moe-router-gradient topk and default: drop them",
        lambda s: (
            s.overlap_moe_expert_parallel_comm
            or (s.graph_impl != "none" and "moe_router" in s.graph_modules)
        ),
        only=beyond_default,
    ),
    Rule(
        "--default-vector-kernels with an estimator other than default",
        "refused",
        "--default-vector-kernels are the kernels of --moe-router-gradient default: drop the flag",
        lambda s: s.options.kernels,
        only=beyond_default,
    ),
    Rule(
        "--paper-default-moe with an estimator other than default",
        "refused",
        "--paper-default-moe is the preset of --moe-router-gradient default: drop one of the two",
        lambda s: s.paper_default_moe,
        only=beyond_default,
    ),
    Rule(
        "--moe-router-gradient default-linear with options of the forward term",
        "refused",
        "--moe-router-gradient default-linear works in the backward pass alone, with vectors of the"
        " step before: drop --default-vector-order before-use and --default-vector-fade-in, or use"
        " --moe-router-gradient default",
        lambda s: s.options.order == "before-use" or s.options.fade_in,
        only=named("default-linear"),
    ),
    Rule(
        "--moe-router-gradient default-linear with --moe-pad-expert-input-to-capacity",
        "refused",
        "--moe-pad-expert-input-to-capacity has not been verified with --moe-router-gradient"
        " default-linear: drop the flag",
        lambda s: s.moe_pad_expert_input_to_capacity,
        only=named("default-linear"),
    ),
    Rule(
        "--log-router-gradient-fidelity that is no multiple of --log-interval",
        "refused",
        "--log-router-gradient-fidelity must be a multiple of --log-interval, whose steps are"
        " logged: raise it, or lower --log-interval",
        # Arguments only: a TransformerConfig knows no log.
        lambda s: (
            s.options.fidelity_interval
            and s.log_interval
            and s.options.fidelity_interval % s.log_interval
        ),
        topk_too=True,
    ),
    Rule(
        "--log-router-gradient-fidelity with what hides a layer's backward pass",
        "refused",
        "--log-router-gradient-fidelity needs a softmax over all experts"
        " (--moe-router-pre-softmax) or remoe, and does not go with"
        " --overlap-moe-expert-parallel-comm, CUDA graphs of the router,"
        " --moe-token-dispatcher-type flex, --moe-apply-probs-on-input,"
        " --default-vector-normalized-gate or --fp8-recipe delayed: drop one of the two",
        lambda s: (
            s.options.fidelity_interval
            and (
                s.overlap_moe_expert_parallel_comm
                or (s.graph_impl != "none" and "moe_router" in s.graph_modules)
                or s.moe_token_dispatcher_type == "flex"
                or s.moe_apply_probs_on_input
                or s.options.normalized_gate
                or (s.fp8 and s.fp8_recipe == "delayed")
                or s.score != "softmax"
                or not (s.moe_router_pre_softmax or s.options.chooses)
            )
        ),
        topk_too=True,
    ),
)
