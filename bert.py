"""BERT, written by hand, and its checkpoints.

The encoder of Devlin et al. 2018 (arXiv 1810.04805) from plain torch.nn parts, in the order in
which a sentence passes through it: embeddings, layers, and a head that reads an answer off [CLS].

There is no classifier to train (a teacher may have one). The head is BERT's own head of masked
language modelling (MLM), asked for a few *label words* in place of its whole vocabulary: a review
is positive if the frozen head would rather write "great" than "terrible" at its [CLS].

A checkpoint is a folder in the Hugging Face layout: config.json, model.safetensors, and the
vocabulary, which data.py reads. NAMES and TIED translate between their tensor names and ours, for
BERT and for DistilBERT, which has no segments. A tensor in none of the tables is refused.

Letters: B batch, T tokens, C label words. Q K V O U D are the six matrices of a layer.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

# ---- The model ------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    """The sizes of a BERT, under the keys of BERT's config.json. The defaults are those of
    bert-base-uncased. Without segments, type_vocab_size 0, it is a DistilBERT."""
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12  # nn.LayerNorm's own default is 1e-5
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    @property
    def model_type(self):
        return "bert" if self.type_vocab_size else "distilbert"

class Embeddings(nn.Module):
    """Token + position + segment, each a learned table, summed and normalised."""

    def __init__(self, c):
        super().__init__()
        self.word = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type = None
        if c.type_vocab_size:
            self.token_type = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids):  # (B, T), (B, T)
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word(input_ids) + self.position(position)
        if self.token_type is not None:
            x = x + self.token_type(token_type_ids)
        return self.dropout(self.norm(x))  # (B, T, hidden)

class Layer(nn.Module):
    """One encoder layer: self-attention, then feed-forward; after each, dropout, the residual and a
    LayerNorm. Q K V O are the matrices of the attention, U (up) and D (down) of the feed-forward.
    GELU is the exact one, torch's default, not the approximation by tanh."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.num_attention_heads
        self.Q = nn.Linear(c.hidden_size, c.hidden_size)
        self.K = nn.Linear(c.hidden_size, c.hidden_size)
        self.V = nn.Linear(c.hidden_size, c.hidden_size)
        self.O = nn.Linear(c.hidden_size, c.hidden_size)
        self.U = nn.Linear(c.hidden_size, c.intermediate_size)
        self.D = nn.Linear(c.intermediate_size, c.hidden_size)
        self.attention_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.output_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.attention_dropout = nn.Dropout(c.attention_probs_dropout_prob)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, x, attention_mask):  # (B, T, hidden), (B, 1, 1, T) or None
        def split(y):  # (B, T, hidden) -> (B, heads, T, hidden / heads)
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        a = F.scaled_dot_product_attention(
            split(self.Q(x)), split(self.K(x)), split(self.V(x)), attn_mask=attention_mask,
            dropout_p=self.attention_dropout.p if self.training else 0.0)
        a = a.transpose(1, 2).flatten(2)  # (B, T, hidden)
        x = self.attention_norm(x + self.dropout(self.O(a)))
        return self.output_norm(x + self.dropout(self.D(F.gelu(self.U(x)))))

class MLMHead(nn.Module):
    """The transform in front of BERT's decoder, and the decoder's bias. The decoder's matrix is the
    word embeddings themselves (tied)."""

    def __init__(self, c):
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, hidden):  # (..., hidden) -> (..., hidden)
        return self.norm(F.gelu(self.dense(hidden)))

class Classifier(nn.Module):
    """The head of an ordinary classifier, which a teacher may have."""

    def __init__(self, c, n_classes):
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)
        self.activation = torch.tanh if c.model_type == "bert" else F.relu
        self.classes = nn.Linear(c.hidden_size, n_classes)

    def forward(self, hidden, class_ids=slice(None)):  # (..., hidden) -> (..., classes)
        return self.classes(self.activation(self.dense(hidden)))[..., class_ids]

class Bert(nn.Module):
    """A BERT of any size, its weights drawn from a normal distribution.

    With mlm_head=False (sentence encoders ship without one) the logits of words are the plain
    product of the hidden state with their embeddings."""

    def __init__(self, config, mlm_head=True, n_classes=0):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.mlm = MLMHead(config) if mlm_head else None
        self.classifier = Classifier(config, n_classes) if n_classes else None
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """Token ids (B, T), 1 for a token and 0 for padding (B, T), segments 0 or 1 (B, T) -> last
        hidden states (B, T, hidden). No token attends to padding. Without an attention_mask, all
        positions count; without segments, all are 0."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if attention_mask is not None:
            attention_mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        x = self.embeddings(input_ids, token_type_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x

    def set_dropout(self, p):
        """Sets the probability of every dropout, those inside the attention included."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p

    def label_logits(self, hidden, label_ids):
        """Last hidden states (B, T, hidden), ids of the label words (C,) -> their logits at [CLS]
        (B, C). Only these C rows of the decoder are multiplied."""
        return self.mlm_logits(hidden[:, 0], label_ids)  # [CLS] is the first token

    def mlm_logits(self, hidden, word_ids=slice(None)):
        """Hidden states (..., hidden) -> logits (..., words) of the whole vocabulary, or of the
        given words."""
        decoder, bias = self.embeddings.word.weight[word_ids], None
        if self.mlm is not None:
            hidden, bias = self.mlm(hidden), self.mlm.bias[word_ids]
        return F.linear(hidden, decoder, bias)

# ---- Checkpoints ----------------------------------------------------------------------------

# Our modules and Hugging Face's, in a BERT and in a DistilBERT; * is a layer's number. Where a name
# begins with it, `encoder.layer.*` or `transformer.layer.*` is meant. `cls.predictions.bias` is
# `mlm.bias`. The encoder's names may begin with `bert.` or `distilbert.`; in files of ours they do.
MODULES = [row.split() for row in """
    embeddings.word           embeddings.word_embeddings            embeddings.word_embeddings
    embeddings.position       embeddings.position_embeddings        embeddings.position_embeddings
    embeddings.token_type     embeddings.token_type_embeddings      -
    embeddings.norm           embeddings.LayerNorm                  embeddings.LayerNorm
    layers.*.Q                *.attention.self.query                *.attention.q_lin
    layers.*.K                *.attention.self.key                  *.attention.k_lin
    layers.*.V                *.attention.self.value                *.attention.v_lin
    layers.*.O                *.attention.output.dense              *.attention.out_lin
    layers.*.U                *.intermediate.dense                  *.ffn.lin1
    layers.*.D                *.output.dense                        *.ffn.lin2
    layers.*.attention_norm   *.attention.output.LayerNorm          *.sa_layer_norm
    layers.*.output_norm      *.output.LayerNorm                    *.output_layer_norm
    mlm.dense                 cls.predictions.transform.dense       vocab_transform
    mlm.norm                  cls.predictions.transform.LayerNorm   vocab_layer_norm
    mlm                       cls.predictions                       vocab_projector
    classifier.dense          pooler.dense                          pre_classifier
    classifier.classes        classifier                            classifier
""".strip().split("\n")]
NAMES = {  # {model_type: {theirs: ours}}
    "bert": {bert.replace("*", "encoder.layer.*"): ours for ours, bert, _ in MODULES},
    "distilbert": {distilbert.replace("*", "transformer.layer.*"): ours
                   for ours, _, distilbert in MODULES if distilbert != "-"},
}
# Second copies of a tensor that some exports store. They must equal the first copy.
TIED = {
    "cls.predictions.decoder.weight": "embeddings.word.weight",
    "cls.predictions.decoder.bias":   "mlm.bias",
    "vocab_projector.weight":         "embeddings.word.weight",
}
# What a file may hold and nothing here needs: a buffer that counts 0, 1, 2, ..., and the head of
# next-sentence prediction. (The pooler, in front of it, only a classifier needs.)
DROPPED = ("embeddings.position_ids", "cls.seq_relationship.weight", "cls.seq_relationship.bias")
# What a config.json may say beside the sizes, and the one value of each that this code computes.
FIXED = {"hidden_act": "gelu", "activation": "gelu", "position_embedding_type": "absolute",
         "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True,
         "quantization_config": None}
# Config's field -> DistilBERT's key, where that is another than BERT's.
DISTILBERT_KEYS = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim", "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout"}

def _rename(name, table):
    """A tensor's name through a table of modules, None if unknown:
    `encoder.layer.3.attention.self.query.bias` <-> `layers.3.Q.bias`
    `embeddings.LayerNorm.bias` <-> `embeddings.norm.bias`"""
    module, _, parameter = name.rpartition(".")
    number = next((part for part in module.split(".") if part.isdigit()), "*")  # "*": there is none
    target = table.get(module.replace(f".{number}.", ".*."))
    return f"{target.replace('*', number)}.{parameter}" if target else None

def our_name(name, model_type="bert"):
    """A checkpoint's tensor name in any spelling -> ours, "dropped" or, if it is unknown, None.
    `bert.encoder.layer.0.output.LayerNorm.gamma` -> `layers.0.output_norm.weight`"""
    name = name.removeprefix(f"{model_type}.")
    if name in TIED:
        return TIED[name]
    # "orm" ends LayerNorm and layer_norm alike.
    name = name.replace("orm.gamma", "orm.weight").replace("orm.beta", "orm.bias")
    return "dropped" if name in DROPPED else _rename(name, NAMES[model_type])

def hf_name(name, model_type="bert"):
    """Our tensor name -> Hugging Face's: `layers.3.Q.weight` ->
    `bert.encoder.layer.3.attention.self.query.weight`"""
    found = _rename(name, {ours: theirs for theirs, ours in NAMES[model_type].items()})
    is_head = name.startswith(("mlm.", "classifier."))
    return found if is_head or found is None else f"{model_type}.{found}"

def find_pretrained(name):
    """The local folder of a model: `name` itself if it is a folder, else that repository of the
    Hugging Face hub, downloaded to huggingface_hub's cache if it is not there. Raises
    FileNotFoundError where neither can be had."""
    if Path(name).is_dir():
        return Path(name)
    print(f"{name} is not a folder here: looking for it on the Hugging Face hub")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=[
            "config.json", "model.safetensors", "vocab.txt", "tokenizer.json",
            "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]))
    except Exception as error:  # the client raises a dozen kinds
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{name}: neither a local folder nor to be had from the hub ({reason}); give a folder "
            "with config.json, model.safetensors and vocab.txt or tokenizer.json") from error

def _check_file(path):
    others = [*path.parent.glob("*.bin"), *path.parent.glob("*.index.json")]
    mend = "a model folder holds config.json, model.safetensors and vocab.txt or tokenizer.json"
    if others and path.suffix == ".safetensors":
        mend = (f"transformers makes it of {others[0].name}: AutoModelForMaskedLM.from_pretrained("
                f"{str(path.parent)!r}).save_pretrained('new', max_shard_size='9GB'); if it has no "
                "MLM head, AutoModel")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {mend}")
    with open(path, "rb") as file:
        if file.read(20) == b"version https://git-":
            raise ValueError(f"{path}: a pointer of Git LFS; `git lfs pull` gets the file")

def read_config(path):
    """config.json -> Config. Raises FileNotFoundError, and ValueError naming the key that is
    missing or asks for a BERT that is not this one."""
    _check_file(Path(path))
    try:
        raw = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); expected a model's config") from None
    found = raw.get("model_type") if isinstance(raw, dict) else None
    if found not in list(NAMES):
        raise ValueError(f"{path}: model_type is {found!r}; expected {' or '.join(NAMES)}")
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}; this code implements only {value!r}")
    keys = DISTILBERT_KEYS if found == "distilbert" else {}
    fields = {field.name: _config_value(path, raw, keys.get(field.name, field.name), field)
              for field in dataclasses.fields(Config)}
    if found == "distilbert":
        fields["type_vocab_size"] = 0
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise ValueError(f"{path}: hidden_size {fields['hidden_size']} is no multiple of "
                         f"num_attention_heads {fields['num_attention_heads']}")
    return Config(**fields)

def _config_value(path, raw, key, field):
    # May be left out: numbers that once were constants, and type_vocab_size.
    optional = field.type is float or field.name == "type_vocab_size"
    value = raw.get(key, field.default if optional else None)
    low, high = (1, 10_000_000) if field.type is int else (0, 0.999)  # above any vocabulary
    if type(value) not in (int, field.type) or not low <= value <= high:
        raise ValueError(f"{path}: {key} is {value!r}; expected {field.type.__name__}, "
                         f"{low} to {high:,}")
    return field.type(value)

def load_pretrained(folder, classifier=False):
    """A folder with config.json and model.safetensors -> Bert, float32, in eval mode.

    Takes names with and without `bert.`, LayerNorm as gamma/beta or weight/bias, the decoder stored
    or tied, the MLM head there or not; an ordinary classifier only if asked. Raises
    FileNotFoundError, and ValueError naming a tensor that is missing, surplus, of another shape or
    kind, or not finite."""
    path = Path(folder) / "model.safetensors"
    config = read_config(path.with_name("config.json"))
    _check_file(path)
    try:
        stored = load_file(path)
    except Exception as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); get it again") from None
    if "classifier.weight" in stored and not classifier:
        raise ValueError(f"{path}: an ordinary classifier; expected a model with an MLM head, or "
                         "without any head")
    state, found_as = {}, {}
    for name, tensor in stored.items():
        ours = our_name(name, config.model_type)
        if ours and ours.startswith("classifier.dense.") and "classifier.weight" not in stored:
            ours = "dropped"  # a pooler
        if ours is None:
            raise ValueError(f"{path}: tensor {name} has no place in a {config.model_type}")
        if ours in state and not torch.equal(state[ours].float(), tensor.float()):
            raise ValueError(f"{path}: tensors {found_as[ours]} and {name} are two copies of one, "
                             "but they differ")
        if ours != "dropped":
            state[ours], found_as[ours] = tensor, name
    return build(config, state, path)

def build(config, state, path):
    """{our name: tensor} -> Bert, float32, in eval mode. Raises ValueError naming `path` and the
    tensor that is missing, surplus, of another shape or kind, or not finite."""
    # To build layers that the file does not hold could take minutes, even without weights.
    held = {name.split(".")[1] for name in state if name.startswith("layers.")}
    if config.num_hidden_layers > len(held):
        raise ValueError(f"{path}: holds {len(held)} layers; config.json says num_hidden_layers "
                         f"{config.num_hidden_layers}")
    classes = state.get("classifier.classes.bias", torch.empty(0))
    with torch.device("meta"):  # the shapes, without the memory or the time for random weights
        model = Bert(config, any(name.startswith("mlm.") for name in state), classes.numel())
    expected = model.state_dict()
    for name in {**expected, **state}:
        tensor, problem = state.get(name), None
        if tensor is None:
            problem = "is missing"
        elif name not in expected:
            problem = "is surplus"
            if name.startswith("layers."):
                problem += f"; config.json says num_hidden_layers {config.num_hidden_layers}"
        elif tensor.shape != expected[name].shape:
            problem = (f"has shape {tuple(tensor.shape)}; config.json makes it "
                       f"{tuple(expected[name].shape)}")
        elif not tensor.is_floating_point():
            problem = f"is {tensor.dtype}; expected floating point"
        elif not tensor.isfinite().all():
            problem = "holds nan or inf; the file is damaged"
        if problem:
            name = hf_name(name, config.model_type) or name
            raise ValueError(f"{path}: tensor {name} {problem}")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.eval()

def save_pretrained(model, folder, whole=contextlib.nullcontext):
    """The reverse of load_pretrained, except for a classifier: writes config.json and
    model.safetensors as Hugging Face's BertForMaskedLM (BertModel without an MLM head) reads them.
    `whole(path)` is a context that gives the name to write to."""
    save_config(model, folder, whole)
    state = {hf_name(name, model.config.model_type): tensor.detach().cpu().contiguous()
             for name, tensor in model.state_dict().items()}
    with whole(Path(folder) / "model.safetensors") as path:
        save_file(state, path, metadata={"format": "pt"})

def save_config(model, folder, whole=contextlib.nullcontext):
    Path(folder).mkdir(parents=True, exist_ok=True)
    kind, config = model.config.model_type, dataclasses.asdict(model.config)
    keys, name = ({}, "Bert") if kind == "bert" else (DISTILBERT_KEYS, "DistilBert")
    config = {keys.get(field, field): value for field, value in config.items()
              if field != "type_vocab_size" or value}
    name += "Model" if model.mlm is None else "ForMaskedLM"
    config |= {"model_type": kind, "hidden_act": "gelu", "architectures": [name]}
    with whole(Path(folder) / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
