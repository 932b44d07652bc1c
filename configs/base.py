"""Every key of a study, with its unit and its default. Studies start from here and change values.

A None that may be set from the command line is a placeholder with a type. Lists are tuples. Sizes
here are those of a small trial; a study sets its own.
"""

import ml_collections
from ml_collections import config_dict


def _mapping() -> config_dict.FieldReference:
    """A None that a config file may set to a mapping; the command line then sets its keys."""
    return config_dict.placeholder(ml_collections.ConfigDict)


def attention() -> ml_collections.ConfigDict:
    """Fields of moe.AttentionConfig."""
    return ml_collections.ConfigDict(
        dict(
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            qk_norm='head',  # 'none', 'head' or 'full'
            rope_theta=10_000.0,
            rope_scaling=_mapping(),  # of a moe.LinearScaling, Llama3Scaling or YarnScaling
            window=config_dict.placeholder(int),  # tokens a query sees; None for all
            sinks=False,  # a learnt logit of each head, to attend to nothing
            qkv_bias=False,
            output_bias=False,
            clip_qkv=config_dict.placeholder(float),
            scale=config_dict.placeholder(float),  # of the scores; None for head_dim^-0.5
            soft_cap=config_dict.placeholder(float),  # of the scores
        )
    )


def model() -> ml_collections.ConfigDict:
    """Fields of moe.TransformerConfig but vocab_size, which is the tokenizer's."""
    return ml_collections.ConfigDict(
        dict(
            num_layers=4,
            embed_dim=128,
            mlp_dim=384,
            attention=attention(),
            moe=_mapping(),  # `experts()` of a mixture-of-experts model
            activation='silu',  # 'silu', 'gelu' or 'clamped_swiglu'
            norm_eps=1e-6,
            norm_unit_offset=False,  # scales are stored less one
            norm_scale_float32=False,  # they multiply before the cast to dtype
            post_norms=False,  # of what attention and MLP return
            scale_embedding=False,  # by embed_dim^0.5
            logit_soft_cap=config_dict.placeholder(float),
            tie_embeddings=True,
            mtp_depth=0,  # modules that predict 1, 2, ... tokens further ahead
            scan_layers=True,
            remat='none',  # 'none', 'dots' or 'full'
            dtype='float32',  # of activations
            param_dtype='float32',
        )
    )


def experts() -> ml_collections.ConfigDict:
    """Fields of moe.MoEConfig; set as `model.moe` of a mixture-of-experts model."""
    return ml_collections.ConfigDict(
        dict(
            router=dict(
                num_experts=8,
                experts_per_token=2,
                score='softmax',  # 'softmax' or 'sigmoid'
                normalize='after',  # 'none', 'before' or 'after' top-k
                scale=1.0,
                eps=1e-20,
                selection_bias=False,
                choice='token',  # or 'expert', 'hash', 'soft'
                num_groups=1,  # of experts, of which a token's come from
                groups_kept=1,
                bias=False,  # learnt, of the logits
                jitter=0.0,  # noise on the input while training, in [0, 1)
                hash_seed=0,  # of choice='hash'
                slots=1,  # of each expert in each row, of choice='soft'
            ),
            expert_dim=128,
            shared_dim=0,  # hidden width of the shared expert; 0 for none
            dispatch='grouped',  # 'grouped' (dropless), 'capacity' or 'dense'
            capacity_factor=1.25,
            exchange_factor=config_dict.placeholder(
                float
            ),  # of a shard's balanced load; None: worst
            exchange_chunks=1,  # parts whose exchanges and products may overlap
            storage='fused',  # in memory; or 'per_expert', each by itself
            bias=False,  # of the experts' projections
            first_dense_layers=0,
            layer_step=1,
            layers=config_dict.placeholder(tuple),
        )
    )


def optimizer() -> ml_collections.ConfigDict:
    """Fields of distill.optimizer.OptimizerConfig."""
    return ml_collections.ConfigDict(
        dict(
            name='adamw',  # 'adamw' or 'muon'
            learning_rate=1e-3,  # at its peak
            warmup_steps=20,
            schedule='cosine',  # 'cosine', 'wsd' or 'constant'
            decay_fraction=0.2,  # of all steps, in which 'wsd' decays
            final_fraction=0.1,  # of the peak, at the last step
            weight_decay=0.1,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            clip_norm=1.0,
            muon_momentum=0.95,
            muon_iterations=5,
            muon_rms=0.2,  # of an update; about AdamW's
            qk_clip=config_dict.placeholder(float),  # the largest attention logit, enforced by step
        )
    )


def training(steps: int) -> ml_collections.ConfigDict:
    """Fields of distill.TrainConfig."""
    return ml_collections.ConfigDict(
        dict(
            steps=steps,
            micro_batches=1,  # equal parts of a batch whose gradients are added
            chunk_size=512,  # tokens whose logits exist at one time
            log_every=10,  # steps
            checkpoint_every=100,  # steps
            keep_latest=2,
            max_skipped=5,  # updates in a row
        )
    )


def provenance() -> ml_collections.ConfigDict:
    """Fields of distill.provenance.Provenance; nothing is declared."""
    return ml_collections.ConfigDict(
        dict(
            name=config_dict.placeholder(str),
            version=config_dict.placeholder(str),
            licence=config_dict.placeholder(str),
            permits_training=config_dict.placeholder(bool),  # whether its terms do
        )
    )


def init() -> ml_collections.ConfigDict:
    """Fields of experiments.init_config.InitConfig; what is None stays at the method's default."""
    return ml_collections.ConfigDict(
        dict(
            method='random',  # or one of moe.surgery.METHODS
            source='teacher',  # what those start from: the study's own, 'checkpoint' or 'hf'
            # A stage's folder in another workdir, or with 'hf' a published model's, which 'copy'
            # makes the student, its architecture too.
            checkpoint=config_dict.placeholder(str),
            provenance=provenance(),  # of a published model
            calibration_rows=32,  # of seq_len tokens of the train split
            noise=config_dict.placeholder(float),  # of 'upcycle', as are the next two
            router=config_dict.placeholder(str),  # 'drawn' or 'centroids'
            router_std=config_dict.placeholder(float),
            by=config_dict.placeholder(str),  # 'frequency', 'weight' or 'activation'
            similarity=config_dict.placeholder(str),  # 'outputs' or 'weights'
        )
    )


def remote() -> ml_collections.ConfigDict:
    """Fields of experiments.remote_config.RemoteConfig; read where teacher.source='remote'."""
    return ml_collections.ConfigDict(
        dict(
            base_url=config_dict.placeholder(str),  # such as 'https://host/v1'
            model=config_dict.placeholder(str),  # as the server calls it
            tokenizer=config_dict.placeholder(str),  # the folder of the teacher's; None: data's
            api_key_variable=config_dict.placeholder(str),  # of the environment; never the key
            concurrency=8,  # requests at one time
            timeout=120.0,  # seconds of one request
            attempts=6,  # of one request
            first_wait=1.0,  # seconds that the first wait is below; doubles
            longest_wait=60.0,  # seconds that a wait is below
            max_tokens=10_000_000,  # of all prompts and answers of a ledger; None for no limit
            max_dollars=config_dict.placeholder(float),  # of the same; needs the prices
            prompt_price=config_dict.placeholder(float),  # dollars for a million tokens
            written_price=config_dict.placeholder(float),  # dollars for a million tokens
            scoring='echo',  # of the stage 'targets'; or 'prompt_logprobs', 'written'
            tokens_as_ids=True,  # tokens are named by their ids (vLLM, experiments.serve)
            temperature=1.0,  # of the texts that experiments.remote has written, as all below
            top_p=1.0,
            max_new_tokens=512,
            # Of a row of prompts, by its fields, such as 'Question: {question}'; None for rows of
            # `prompt` or `messages`.
            prompt=config_dict.placeholder(str),
            top_log_probs=0,  # ids listed beside each token, for scoring='written'
            keep_cut=False,  # whether texts that were cut off are data too
        )
    )


def schedule(kind: str, start: float, end: float, steps: int) -> dict[str, float | str]:
    """Fields of distill.Schedule, for any number of a term."""
    return dict(kind=kind, start=start, end=end, steps=steps)  # 'linear' or 'cosine'


def term(name: str, **fields: float | str | bool | dict) -> ml_collections.ConfigDict:
    """One term of an objective; `name` is a divergence, fields are those of distill.Term."""
    scheduled = {key: value for key, value in fields.items() if isinstance(value, dict)}
    term = ml_collections.ConfigDict(
        dict(
            name=name,
            weight=1.0,
            temperature=1.0,  # of both sides
            scale_by_temperature_squared=False,
            standardize=False,  # both sides' logits, to mean 0 and deviation 1
            beta=config_dict.placeholder(float),  # of 'jsd'
            lam=config_dict.placeholder(float),  # of the skew divergences
            alpha=config_dict.placeholder(float),  # of 'alpha_divergence'
            mu=config_dict.placeholder(float),  # of 'adaptive_kl'
            k=config_dict.placeholder(int),  # of 'hinge' and 'ranking'
            on=config_dict.placeholder(str),  # 'text', or what 'student' or 'teacher' wrote
        )
        | scheduled
    )
    term.update({key: value for key, value in fields.items() if key not in scheduled})
    return term


def feature(kind: str, **fields: float | str | bool | tuple | dict) -> ml_collections.ConfigDict:
    """What is matched inside of student and teacher; fields are those of distill.Feature."""
    scheduled = {key: value for key, value in fields.items() if isinstance(value, dict)}
    feature = ml_collections.ConfigDict(
        dict(
            kind=kind,  # 'embedding', 'hidden', 'relation', 'attention', 'router' or 'usage'
            weight=1.0,
            layers=(),  # pairs (student, teacher), from 0; empty for all, in order
            metric=config_dict.placeholder(str),  # of states: 'mse' or 'cosine'
            project=config_dict.placeholder(bool),  # of states: whether through a learnt projector
            of=config_dict.placeholder(str),  # of 'relation': 'queries', 'keys' or 'values'
            heads=config_dict.placeholder(int),  # of 'relation': relation heads
        )
        | scheduled
    )
    feature.update({key: value for key, value in fields.items() if key not in scheduled})
    return feature


def features(**named: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """What is matched, each a `feature()`, under names of one's own."""
    return ml_collections.ConfigDict(named)


def cross_tokenizer(method: str, **fields: float | str | dict) -> ml_collections.ConfigDict:
    """Fields of distill.across.CrossTokenizer, set as `student.cross_tokenizer`.

    The student's tokenizer is then that of what it starts from, or the one that `data` describes,
    and the teacher's its own.
    """
    scheduled = {key: value for key, value in fields.items() if isinstance(value, dict)}
    across = ml_collections.ConfigDict(
        dict(
            # 'uld' (sorted probabilities), 'gold' (matched ids, the rest sorted) or 'dskd' (each
            # model under the other's head, through learnt projectors).
            method=method,
            weight=1.0,  # beside the terms, of which cross_entropy alone may stay
            temperature=1.0,  # of both sides
            divergence=config_dict.placeholder(str),  # of 'gold': 'jsd', 'forward_kl', 'reverse_kl'
            beta=config_dict.placeholder(float),  # of 'jsd'
            matched_weight=config_dict.placeholder(float),  # of 'gold'; None: share of shared ids
            unmatched_weight=config_dict.placeholder(float),  # of 'gold'; None: the rest of it
            teacher_seq_len=config_dict.placeholder(int),  # tokens; None for twice data.seq_len
        )
        | scheduled
    )
    across.update({key: value for key, value in fields.items() if key not in scheduled})
    return across


def further_teacher(checkpoint: str) -> ml_collections.ConfigDict:
    """Fields of experiments.panel_config.FurtherTeacherConfig."""
    return ml_collections.ConfigDict(
        dict(
            source='checkpoint',  # or 'hf'
            checkpoint=checkpoint,
            dtype='float32',
            provenance=provenance(),
            model=model(),
            weight=1.0,  # in the loss, beside those of the others
        )
    )


def further_teachers(**checkpoints: str) -> ml_collections.ConfigDict:
    """Teachers besides the first, by names: `further_teachers(maths='runs/maths/teacher')`."""
    return ml_collections.ConfigDict(
        {name: further_teacher(folder) for name, folder in checkpoints.items()}
    )


def rollout() -> ml_collections.ConfigDict:
    """Fields of distill.RolloutConfig; set as `student.rollout` to learn on-policy."""
    return ml_collections.ConfigDict(
        dict(
            lmbda=0.5,  # share of the sequences that the student writes
            teacher_share=0.0,  # share that the teacher writes
            temperature=1.0,  # of what is drawn; 0 is greedy
            max_new_tokens=128,
            replay_share=0.0,  # of steps, whose student sequences are of the steps before
            staleness=0,  # steps that those are kept for at most
        )
    )


def mesh(
    *, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1
) -> ml_collections.ConfigDict:
    """Fields of moe.sharding.MeshConfig: devices along each axis; -1 is the rest."""
    return ml_collections.ConfigDict(dict(data=data, fsdp=fsdp, expert=expert, tensor=tensor))


def quantise(weights: str) -> ml_collections.ConfigDict:
    """Fields of experiments.quantise_config.QuantiseConfig; needs the extra `quant`."""
    config = ml_collections.ConfigDict(
        dict(
            weights=weights,  # 'int8', 'fp8' or 'int4_experts'
            optimizer=optimizer(),
            train=training(steps=100),
        )
    )
    config.optimizer.learning_rate = 1e-4
    return config


def get_config() -> ml_collections.ConfigDict:
    """A small study of everything."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data = dict(
        source='python',  # or a path or glob of .txt, .jsonl, .parquet, ArrayRecord; or a folder
        # of .jsonl logs, in which new files join at the next epoch
        # Of a .jsonl or .parquet row; 'messages' is rendered as a conversation, and a text with
        # names of fields, 'Question: {question}', with what they hold.
        field='text',
        filter=config_dict.placeholder(str),  # of logs: an installed filter of personal data
        allow_unlicensed=False,  # of logs: whether rows without a `licence` are trained on
        route_field=config_dict.placeholder(str),  # of a row: which of `more_teachers` teaches it
        max_bytes=8_000_000,  # of text that is read, whole documents at a time
        tokenizer='bpe',  # 'bpe' (trained once on the train split) or 'byte'
        vocab_size=4096,  # entries of the 'bpe' tokenizer
        held_out_fraction=0.05,  # of the documents
        # Text of its own to hold out, instead of that fraction; and the field of its rows, where
        # it is another.
        held_out_source=config_dict.placeholder(str),
        held_out_field=config_dict.placeholder(str),
        held_out_documents=200,  # evaluated at most
        seq_len=256,  # tokens
        batch_size=16,  # rows, over all hosts
    )
    config.mesh = mesh(data=-1)  # of all devices, or those that `teacher.mesh` leaves
    config.teacher = dict(
        # In this run; or 'checkpoint', 'hf', 'remote'; or 'ema', the student's average.
        source='train',
        # A stage's folder in another workdir, or with 'hf' a published model's, whose architecture
        # and tokenizer then count.
        checkpoint=config_dict.placeholder(str),
        dtype='float32',  # of the frozen teacher's parameters and activations
        provenance=provenance(),  # of a teacher of one's own, what is not declared is known
        remote=remote(),  # with 'remote', how it is reached
        model=model(),
        optimizer=optimizer(),
        train=training(steps=400),
        mtp_weight=0.0,  # of the loss over tokens further ahead; above 0 with model.mtp_depth
        ema_decay=0.999,  # of 'ema', at each update
        weight=1.0,  # in the loss, beside those of `more_teachers`
        # Equal parts of a batch that it reads one by one while it teaches; None: the student's.
        micro_batches=config_dict.placeholder(int),
        mesh=_mapping(),  # `mesh()`, of the last devices, to teach apart from the student
        # While it teaches: 'int8', 'fp8' or 'int4_experts'; None: floats of its dtype.
        weights=config_dict.placeholder(str),
    )
    config.more_teachers = _mapping()  # `further_teachers()`
    config.targets = dict(
        kind='hidden',  # all of the teacher; or 'top_k', 'sampled', 'truncated', 'text'
        cached=False,  # written once by a stage, rather than made beside the student
        path=config_dict.placeholder(str),  # another study's folder of targets
        steps=config_dict.placeholder(int),  # batches written; None for those of the student
        temperature=1.0,  # of the teacher; that of the student's terms
        k=64,  # ids of 'top_k' and 'truncated'
        draws=config_dict.placeholder(int),  # of 'sampled'; None finds it from `distinct`
        distinct=12.0,  # ids of a token, on average
        proposal_temperature=1.0,  # of the draws, which are weighed where it is not 1
        rows_per_shard=256,
    )
    config.student = dict(
        model=model(),
        init=init(),
        optimizer=optimizer(),
        train=training(steps=400),
        balance=dict(
            load_balance_weight=0.0,
            load_balance_scope='sequence',  # or 'micro_batch', 'global'
            router_z_weight=0.0,
            selection_bias_rate=1e-3,
            selection_bias_rule='sign',  # or 'proportional'
        ),
        mtp_weight=0.0,  # of the same terms over tokens further ahead, the control's too
        return_weight=0.0,  # of what a token does to those after it, where the student writes
        rollout=_mapping(),  # `rollout()`, to learn from what a model writes
        features=_mapping(),  # `features()`, matched inside of student and teacher
        cross_tokenizer=_mapping(),  # `cross_tokenizer()`, for a teacher of another tokenizer
        terms=dict(
            kl=term('forward_kl', weight=0.9),
            ce=term('cross_entropy', weight=0.1),
        ),
    )
    config.student.model.moe = experts()
    config.student.model.moe.router.selection_bias = True
    config.quantise = _mapping()  # `quantise()`, to train the student on for quantised weights
    config.control = dict(terms=dict(ce=term('cross_entropy')))
    config.evaluate = dict(
        batch_size=16,  # rows
        context_length=256,  # tokens; of the FLOPs and bytes a token costs
        prefill_batch=16,  # rows of the throughput measurement
        chip='cpu-2vcpu',  # whose price per hour is charged
        prompts=('def ', 'The ', 'import '),
        sample_documents=5,  # held-out documents whose beginnings are prompts too
        sample_tokens=96,
        temperature=0.7,
        weights=(),  # 'int8', 'fp8', 'int4_experts': in which the student is measured too
    )
    config.exams = dict(  # none, unless some are named
        tasks=(),  # of lm-eval, by name; with the extra `eval`, and their data on this machine
        tasks_path=config_dict.placeholder(str),  # a folder of more tasks' YAML files
        shots=config_dict.placeholder(int),  # examples before a question; None for each task's own
        limit=config_dict.placeholder(int),  # questions of a task, and of GSM8K; None for all
        chat=False,  # ask tasks and GSM8K as conversations, by the tokenizer's chat template
        system=config_dict.placeholder(str),  # what such a conversation begins with
        multiturn=True,  # examples are turns of their own
        gsm8k=dict(
            test=config_dict.placeholder(str),  # a .jsonl of `question` and `answer`
            train=config_dict.placeholder(str),  # that the examples are drawn from
            shots=5,
            max_new_tokens=256,
        ),
        needle=dict(  # facts in long texts
            lengths=(),  # tokens
            depths=(0.0, 0.25, 0.5, 0.75, 1.0),
            trials=8,  # of each length and depth
            keys=4,  # facts in a text, that the model chooses between
        ),
        rows=8,  # texts at once
        max_length=2048,  # tokens of a question and its answer
    )
    return config
