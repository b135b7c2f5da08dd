"""The base configuration: every key of a run, each with a comment.

Run configs (`experiments/configs/*.py`) start from `get_config()` and only override. Keys are
declared here and nowhere else; the dict is locked, so an unknown key is an error.

A new key gets the default that does what was done before it: so run directories of before it go on (`stages`).
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The `default` preset."""
  c = config_dict.ConfigDict()
  c.seeds = (0,)  # one router and schedule is searched and trained per seed
  c.sparsities = (0.30,)  # global sparsity targets S, each in [0, 1)

  c.model = config_dict.ConfigDict()
  c.model.source = "smollm2-135m"  # known name, Hugging Face directory, .gguf file or hub id
  c.model.dtype = "float32"  # compute dtype of the blocks: float32 or bfloat16
  c.model.remat = "none"  # what backward passes recompute: none, dots or full

  c.mesh = config_dict.ConfigDict()
  c.mesh.data = 1  # replicas of the weights, over which batches and candidates are split; -1: all devices left
  c.mesh.fsdp = 1  # parts of the weights, gathered block by block; batches are split over them as well
  c.mesh.tensor = 1  # parts of heads, MLP and vocabulary
  c.mesh.replicated_mib = 64  # weights that may lie whole on every device of a mesh, in MiB

  c.data = config_dict.ConfigDict()
  c.data.source = "embedded"  # embedded, prompts (JSONL), text (plain or JSONL documents) or hub
  c.data.path = ""  # file of `prompts` and `text`, name or name:subset of `hub`
  c.data.split = "train"  # split of a hub data set
  c.data.chat = False  # wrap prompts in the model's chat template
  c.data.min_context = 32  # shortest context in tokens; shorter prompts are dropped
  c.data.train_min_context = 0  # shortest one in the training set, which then has shorter prompts too; 0: min_context
  c.data.max_context = 96  # longest context in tokens; longer prompts are dropped, text is cut
  c.data.continuation = 32  # scored continuation tokens (longest)
  c.data.min_continuation = 8  # shortest continuation in tokens; shorter prompts are dropped
  c.data.length_buckets = ()  # widths below max_context + continuation that batches may have; each costs a compilation
  c.data.num_search = 32  # prompts on which candidates of the search are judged
  c.data.num_train = 256  # prompts on which the router is trained
  c.data.num_validation = 32  # prompts that choose among generations and checkpoints
  c.data.num_test = 64  # held prompts; only evaluation reads them
  c.data.num_repeats = 0  # further training prompts, in which a passage of the next file is said twice
  c.data.repeats_path = ""  # plain text or JSON Lines of documents ("text"), no text that is evaluated on
  c.data.seed = 0  # which prompts go where, and their order

  c.routing = config_dict.ConfigDict()
  c.routing.kv_mode = "project"  # keys and values of skipped tokens: evict or project
  c.routing.selection = "topk"  # topk (always K) or argmax (at most K)
  c.routing.bucket_multiple = 1  # capacities are rounded up to a multiple of this many tokens
  c.routing.score_window = 8  # context queries whose attention scores the context tokens
  c.routing.decode_sparsity = 0.0  # sparsity asked of continuation tokens, and trained; 0 computes them all
  c.routing.decode_rule = "threshold"  # when a continuation token skips: threshold (paper) or quantile (causal router)
  c.routing.decode_threshold = 0.5  # skip probability above which it skips under the rule `threshold`
  c.routing.one_pass_block = -1  # block whose input decides the gates of all blocks from there on; -1: each its own
  c.routing.evict_from = 0  # under evict the first block that does; those before it project
  c.routing.recent_tokens = 0  # last tokens that take a block's slots first, of contexts of at least four times as many

  c.stand_in = config_dict.ConfigDict()
  c.stand_in.rank = 0  # rank of the linear maps that stand in for skipped blocks; 0: none, as in the paper
  c.stand_in.ridge = 2e-3  # penalty a token of the regression that fits them

  c.router = config_dict.ConfigDict()
  c.router.kind = "per_block"  # global, per_block or recurrent
  c.router.factors = ("position", "score", "rank", "sparsity")  # low-dimensional inputs, any subset
  c.router.hidden_states = True  # feed the normed hidden state as well
  c.router.hidden_size = 64  # width of the router's MLP

  c.search = config_dict.ConfigDict()
  c.search.schedule = "ga"  # ga, uniform, middle, late, influence, fisher, allotted (method.md, section 3) or file
  c.search.schedule_path = ""  # JSON list of L sparsities, for schedule=file
  c.search.seed_schedules = ("uniform", "middle", "late", "influence", "fisher")  # where the search starts
  c.search.grid = 40  # sparsities are multiples of 1/grid
  c.search.max_sparsity = 0.975  # largest sparsity of one block
  c.search.population = 16  # candidates of one generation
  c.search.generations = 12  # generations of the search
  c.search.elite = 4  # best candidates that survive unchanged
  c.search.tournament = 3  # candidates among which a parent is chosen
  c.search.crossover_rate = 0.5  # share of children with two parents
  c.search.mutation_moves = 3  # transfers of sparsity between two blocks a child receives (at most)
  c.search.batch = 8  # prompts evaluated at once

  c.train = config_dict.ConfigDict()
  c.train.steps = 150  # optimizer steps
  c.train.batch = 8  # prompts a step
  c.train.learning_rate = 1e-3  # peak of the cosine schedule
  c.train.warmup = 10  # steps of linear warm-up
  c.train.clip = 1.0  # global gradient norm above which gradients are scaled down
  c.train.distill = "kl"  # distillation loss: kl of scored positions or mse of final hidden states
  c.train.distill_weight = 1.0  # w_d
  c.train.sparsity_weight = 1.0  # w_s
  c.train.sparsity_two_sided = False  # also punish skipping more than asked
  c.train.guide = "fisher"  # target of the guide loss: static or fisher
  c.train.fisher_share = 0.5  # training asks for the found schedule moved this far to the Fisher one; not if allotted
  c.train.warmup_guide_steps = 300  # steps on the guide alone (fisher), without passing the model
  c.train.warmup_guide_prompts = 256  # training prompts whose router inputs stay in host memory for that
  c.train.warmup_guide_learning_rate = 1e-3  # peak learning rate of those steps
  c.train.guide_weight = 1.0  # w_g at step 0
  c.train.guide_stakes = 0.0  # share of a token's weight in the guide that grows with its score's distance from the cut
  c.train.guide_decay = "cosine"  # decay of w_g to 0 over the steps: cosine, linear or none
  c.train.input_gradient = True  # gradients also pass through the hidden states that routers read
  c.train.stand_in_learning_rate = 0.0  # peak rate of maps for skipped blocks, beside the router; 0: as fitted
  c.train.fisher_draws = 2  # backward passes behind one Fisher score; every training prompt is scored
  c.train.validate_every = 25  # steps between two validations; the best router is kept
  c.train.checkpoint_every = 25  # steps between two checkpoints

  c.finetune = config_dict.ConfigDict()
  # 0 where training asks for the very schedule: train.fisher_share=0, or search.schedule fisher or allotted
  c.finetune.rounds = 1  # of (schedule fine-tuning; training again before every further one)
  c.finetune.generations = 8  # generations of the fine-tuning search

  c.evaluation = config_dict.ConfigDict()
  c.evaluation.batch = 8  # prompts evaluated at once
  c.evaluation.perplexity_path = ""  # text whose all-position perplexity is measured; "" = embedded prose of no split
  c.evaluation.perplexity_windows = 8  # windows of that text
  c.evaluation.perplexity_length = 256  # tokens of one window
  c.evaluation.redundancy_prompts = 16  # prompts of the redundancy analysis
  c.lock()
  return c


def paper_preset(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Changes a config to the recipe of the paper (docs/method.md); returns it."""
  config.routing.kv_mode = "evict"
  config.routing.selection = "argmax"
  config.train.guide = "static"
  config.router.kind = "global"
  config.router.hidden_states = False
  config.search.seed_schedules = ("uniform",)
  config.train.batch = 1
  return config


def large_preset(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Sizes for a model of 7B to 13B parameters on accelerators, with Alpaca from the hub; returns the config."""
  config.sparsities = (0.22, 0.30, 0.40)
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.mesh.fsdp = -1
  config.train.batch = config.search.batch = config.evaluation.batch = 16  # rows for a slice of 16 chips
  config.data.source = "hub"
  config.data.path = "tatsu-lab/alpaca"
  config.data.max_context = 320  # with the continuation 384, a multiple of the 128 that splash attention asks for
  config.data.continuation = 64
  config.data.num_search = 64
  config.data.num_train = 1024
  config.data.num_validation = 64
  config.data.num_test = 256
  config.search.population = 24
  config.search.generations = 24
  config.train.steps = 400
  config.train.warmup_guide_prompts = 64  # 32 blocks x 384 tokens x 4096 numbers of 2 bytes: 101 MB a prompt
  config.finetune.generations = 16
  config.evaluation.perplexity_length = 512  # 8 windows of it are fewer tokens than the embedded prose has
  return config


def small_preset(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Sizes for SmolLM2-135M on two CPU cores, for files that docs/results.md names; returns the config."""
  config.data.source = "prompts"
  config.data.path = "alpaca_5000.jsonl"
  config.data.chat = True
  config.data.max_context = 64
  config.data.continuation = 16
  config.data.num_search = 16
  config.data.num_train = 192
  config.data.num_validation = 24
  config.data.num_test = 64
  config.search.population = 10
  config.search.elite = 2
  config.search.generations = 5
  config.train.steps = 16
  config.train.warmup = 2
  config.train.validate_every = 8
  config.train.checkpoint_every = 8
  config.finetune.generations = 4
  config.evaluation.perplexity_path = "wikitext2_valid.txt"
  config.evaluation.perplexity_windows = 4
  config.evaluation.redundancy_prompts = 50
  return config


def needs_gate_scores(config: config_dict.ConfigDict) -> bool:
  """Whether a run reads gate scores: the guide, its schedule or what a search starts from."""
  begins = config.search.seed_schedules if config.search.schedule == "ga" else ()
  return config.train.guide == "fisher" or "fisher" in (config.search.schedule, *begins)


def plan_preset(config: config_dict.ConfigDict, block: int) -> config_dict.ConfigDict:
  """A late plan, made at this block, in the schedule where routers lose least; returns the config."""
  config.routing.one_pass_block = block  # routers of later blocks read what enters this one; those before are dense
  config.search.schedule = "allotted"
  config.finetune.rounds = 0  # from the Fisher schedule, the second best, generations found nothing better
  config.train.input_gradient = False
  return config


def stand_in_preset(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Maps for skipped blocks, trained with the routers, whose dear errors count more; returns the config."""
  config.stand_in.rank = 64
  config.train.stand_in_learning_rate = 3e-4
  config.train.guide_stakes = 0.5
  return config


def late_preset(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """A late plan for SmolLM2-135M and its training, after `small_preset`; returns the config."""
  config.seeds = (0, 1, 2)
  config.sparsities = (0.22, 0.30, 0.40)
  config.data.num_train = 640
  config.train.warmup_guide_prompts = 640
  config.train.steps = 64
  config.train.warmup = 4
  config.train.validate_every = 16
  config.train.checkpoint_every = 16
  return plan_preset(config, 13)


def long_chats_preset(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Prompts of `experiments/long_chats.py` and sizes for them, after `small_preset`; returns the config."""
  config.data.path = "long_train.jsonl"
  config.data.min_context = 256
  config.data.max_context = 520
  config.data.min_continuation = 4
  config.data.num_search = 8
  config.data.num_train = 216
  config.data.num_validation = 32
  config.data.num_test = 48
  config.search.batch = config.train.batch = config.evaluation.batch = 4
  config.train.warmup_guide_prompts = 216
  config.train.steps = 16
  config.train.warmup = 2
  config.evaluation.redundancy_prompts = 16
  return config
