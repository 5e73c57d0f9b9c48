"""The families, one row each, by age."""

from __future__ import annotations

from moeconv.families import rules as r
from moeconv.families.base import BIASED, Family

FAMILIES: tuple[Family, ...] = (
    Family(
        "mixtral",
        ("mixtral",),
        # GPTQModel re-saves Mixtral under mlp.experts
        (*r.PER_EXPERT_W123, *r.PER_EXPERT),
        "mistralai/Mixtral-8x7B-v0.1",
    ),
    Family("qwen2_moe", ("qwen2_moe",), r.PER_EXPERT, "Qwen/Qwen1.5-MoE-A2.7B"),
    Family(
        "dbrx",
        ("dbrx",),
        r.FLAT_DBRX,
        "databricks/dbrx-instruct",
        dense=("ffn.down_proj",),
    ),
    Family(
        "jamba",
        ("jamba",),
        r.PER_EXPERT_FEED_FORWARD,
        "ai21labs/Jamba-v0.1",
        dense=("feed_forward.down_proj",),
    ),
    Family(
        "jetmoe",
        ("jetmoe",),
        r.PACKED_JETMOE,
        "jetmoe/jetmoe-8b",
        carried=("self_attention.experts",),  # its attention has experts of its own
    ),
    Family("deepseek_v2", ("deepseek_v2",), r.PER_EXPERT, "deepseek-ai/DeepSeek-V2"),
    Family(
        "granitemoe",
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        r.PACKED_GRANITE,
        "ibm-granite/granite-3.0-3b-a800m-instruct",
    ),
    Family("phimoe", ("phimoe",), r.PER_EXPERT_W123, "microsoft/Phi-3.5-MoE-instruct"),
    Family("olmoe", ("olmoe",), r.PER_EXPERT, "allenai/OLMoE-1B-7B-0924"),
    Family("aria", ("aria", "aria_text"), r.PACKED_ARIA, "rhymes-ai/Aria"),
    Family(
        "hunyuan_v1_moe",
        ("hunyuan_v1_moe", "hunyuan"),
        r.PER_EXPERT,
        "tencent/Hunyuan-A13B-Instruct",
    ),
    Family("deepseek_v3", ("deepseek_v3",), r.PER_EXPERT, "deepseek-ai/DeepSeek-V3"),
    Family(
        "minimax",
        ("minimax", "minimax_text_01", "minimax_m1"),
        r.PER_EXPERT_W123,
        "MiniMaxAI/MiniMax-M1-80k",
    ),
    Family(
        "bailing_moe",
        (
            *("bailing_moe", "bailing_moe_v2", "bailing_moe_linear", "bailing_moe_linear_v2"),
            "bailing_hybrid",
        ),
        r.PER_EXPERT,
        "inclusionAI/Ling-lite",
    ),
    Family(
        "llama4",
        ("llama4", "llama4_text"),
        (*r.PACKED_FEED_FORWARD, *r.PER_EXPERT_FEED_FORWARD),
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        dense=("feed_forward.down_proj",),
    ),
    Family("qwen3_moe", ("qwen3_moe",), r.PER_EXPERT, "Qwen/Qwen3-30B-A3B"),
    Family("dots1", ("dots1",), r.PER_EXPERT, "rednote-hilab/dots.llm1.inst"),
    Family(
        "ernie4_5_moe",
        ("ernie4_5_moe",),
        r.PER_EXPERT,
        "baidu/ERNIE-4.5-21B-A3B-PT",
    ),
    Family(
        "ernie4_5_vl_moe",  # experts of text, then those of vision, which are smaller
        ("ernie4_5_moe_vl", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
        r.PER_EXPERT,
        "baidu/ERNIE-4.5-VL-28B-A3B-PT",
    ),
    Family("flex_olmo", ("flex_olmo",), r.PER_EXPERT, "allenai/FlexOlmo-7x7B-1T"),
    Family("kimi_k2", ("kimi_k2",), r.PER_EXPERT, "moonshotai/Kimi-K2-Instruct"),
    Family("glm4_moe", ("glm4_moe",), r.PER_EXPERT, "zai-org/GLM-4.5"),
    Family("glm4v_moe", ("glm4v_moe", "glm4v_moe_text"), r.PER_EXPERT, "zai-org/GLM-4.5V"),
    Family(
        "gpt_oss",
        ("gpt_oss",),
        (*r.GPT_OSS, *r.PER_EXPERT),
        "openai/gpt-oss-120b",
        projections=BIASED,
    ),
    Family(
        "gpt_oss_original",
        (),
        r.GPT_OSS_ORIGINAL,
        "openai/gpt-oss-120b, original/",
        projections=BIASED,
        config_fields=("num_experts", "experts_per_token", "initial_context_length"),
    ),
    Family(
        "longcat_flash",
        ("longcat_flash",),
        r.PER_EXPERT,
        "meituan-longcat/LongCat-Flash-Chat",
        dense=("mlps",),
        aliases=(("layers", ("num_layers",)),),  # num_hidden_layers counts both sub-layers
    ),
    Family("qwen3_next", ("qwen3_next",), r.PER_EXPERT, "Qwen/Qwen3-Next-80B-A3B-Instruct"),
    Family(
        "qwen3_vl_moe",
        ("qwen3_vl_moe", "qwen3_vl_moe_text"),
        # published transposed; transformers 5 saves it again as rows; FP8 releases either way
        (*r.PACKED_TURNED, *r.PACKED_ROWS, *r.PER_EXPERT),
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
    ),
    Family("deepseek_v32", ("deepseek_v32",), r.PER_EXPERT, "deepseek-ai/DeepSeek-V3.2-Exp"),
    Family(
        "lfm2_moe",
        ("lfm2_moe",),
        r.PER_EXPERT_FEED_FORWARD_W123,
        "LiquidAI/LFM2-8B-A1B",
        dense=("feed_forward.w2",),
    ),
    Family(
        "kimi_linear",
        ("kimi_linear",),
        r.PER_EXPERT_W123,
        "moonshotai/Kimi-Linear-48B-A3B-Instruct",
        dense=("block_sparse_moe.down_proj", "mlp.down_proj"),
    ),
    Family("minimax_m2", ("minimax_m2",), r.PER_EXPERT_W123, "MiniMaxAI/MiniMax-M2"),
    Family("afmoe", ("afmoe",), r.PER_EXPERT, "arcee-ai/Trinity-Mini"),
    Family(
        "kimi_k25",
        ("kimi_k25",),
        r.PER_EXPERT,
        "moonshotai/Kimi-K2.5",
    ),
    Family(
        "mistral_native",
        (),
        r.PER_EXPERT_NATIVE,
        "mistralai/Mistral-Large-3-675B-Instruct-2512",
        dense=("feed_forward.w2",),
        config_fields=("moe", "dim", "n_layers"),
    ),
    Family(
        "nemotron_h",
        ("nemotron_h",),
        r.PER_EXPERT_NO_GATE,
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        projections=("up", "down"),
        dense=(),  # a layer is a mixer: attention, Mamba, MLP or experts
        aliases=(("layers", ("num_hidden_layers", "layers_block_type")),),
    ),
    Family("mimo_v2_flash", ("mimo_v2_flash",), r.PER_EXPERT, "XiaomiMiMo/MiMo-V2-Flash"),
    Family("glm4_moe_lite", ("glm4_moe_lite",), r.PER_EXPERT, "zai-org/GLM-4.7-Flash"),
    Family("exaone_moe", ("exaone_moe",), r.PER_EXPERT, "LGAI-EXAONE/K-EXAONE-236B-A23B"),
    Family("solar_open", ("solar_open",), r.PER_EXPERT, "upstage/Solar-Open-100B"),
    Family(
        "qwen3_5_moe",
        ("qwen3_5_moe", "qwen3_5_moe_text"),
        # BF16 packed, FP8 one by one; MTP layers either way
        (*r.PACKED_ROWS, *r.PER_EXPERT),
        "Qwen/Qwen3.5-397B-A17B",
    ),
    Family(
        "step3p5",
        ("step3p5", "step3p7"),
        r.STACKED_STEP,
        "stepfun-ai/Step-3.5-Flash",
    ),
    Family("mistral4", ("mistral4",), (*r.PACKED_ROWS, *r.PER_EXPERT), "Mistral4ForCausalLM"),
    Family(
        "deepseek_v4",
        ("deepseek_v4",),
        r.PER_EXPERT_FFN,
        "DeepseekV4ForCausalLM",
        dense=("ffn.w2",),
    ),
    Family(
        "minimax_m3",
        ("minimax_m3_vl", "minimax_m3_vl_text"),
        r.PER_EXPERT_W123,
        "MiniMaxM3SparseForConditionalGeneration",
        dense=("mlp.down_proj", "block_sparse_moe.down_proj"),
    ),
    Family(
        "gemma4",
        ("gemma4", "gemma4_text"),
        (*r.PACKED_BARE, *r.PER_EXPERT_BARE),
        "google/gemma-4-26B-A4B",
    ),
    Family("glm_moe_dsa", ("glm_moe_dsa",), r.PER_EXPERT, "zai-org/GLM-5"),
    Family("axk1", ("axk1",), r.PER_EXPERT, "AXK1ForCausalLM"),
    Family("cohere2_moe", ("cohere2_moe",), r.PER_EXPERT, "Cohere2MoeForCausalLM"),
    Family("hy_v3", ("hy_v3",), r.PER_EXPERT, "HYV3ForCausalLM"),
    Family("hy_v4", ("hy_v4",), (*r.PACKED_ROWS, *r.PER_EXPERT), "HYV4ForCausalLM"),
    Family(
        "laguna",
        ("laguna",),
        r.PER_EXPERT,
        "LagunaForCausalLM",
        carried=("mlp.experts.e_score_correction_bias",),
    ),
    Family("mellum", ("mellum",), r.PER_EXPERT, "MellumForCausalLM"),
)
