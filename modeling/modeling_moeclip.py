"""MoECLIP: a frozen CLIP whose patches are routed to mixtures of LoRA experts (arXiv 2603.03101).

Shapes: B images, N = h x w patches, d vision width, D embedding width, C classes, P sentences, M anomaly maps (one a
tap and window size), K experts.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_moeclip import MoECLIPConfig
from .loss_moeclip import classification_loss, segmentation_loss
from .moe_lora import MoELora, in_float32, record_outputs, vector_norm, without_autocast
from .vision_moeclip import MoECLIPQuickGELU, MoECLIPVisionEmbeddings

# Never imported, but seen by transformers, which copies a repository's code along such lines: a model that is saved
# with its code and its `custom_pipelines` has the pipeline's as well.
if TYPE_CHECKING:
    from .pipeline_moeclip import ZeroShotAnomalyDetectionPipeline  # noqa: F401

# The factor on cosines between patches and anchors.
_PATCH_LOGIT_SCALE = 100.0


@dataclass
class MoECLIPOutput(ModelOutput):
    """
    Output of [`MoECLIPModel`].

    Args:
        loss (`torch.FloatTensor` of shape (), *optional*, with `labels` or `masks`):
            `segmentation + classification + etf_loss_coef * etf + router_aux_loss_coef * balance`.
        losses (`dict[str, torch.Tensor]`, *optional*, with `labels` or `masks`):
            The unweighted terms `segmentation` (with `masks`), `classification` (with `labels`), `etf` and `balance`
            (the last two are 0 in eval mode).
        anomaly_logits (`torch.FloatTensor` of shape (B, M, h, w)):
            `100 (cos t_a - cos t_n)` of every patch; positive where it is nearer to the abnormal anchor. Tap-major:
            all window sizes of the first tap, then those of the second, and so on.
        logits_per_image (`torch.FloatTensor` of shape (B, 2)):
            Products of the image embedding with the normal and the abnormal anchor, -1 to 1, without a temperature.
        patch_embeds (`tuple` of M `torch.FloatTensor` of shape (B, N, D)):
            Patch embeddings of unit length, in the order of `anomaly_logits`.
        image_embeds (`torch.FloatTensor` of shape (B, D)):
            Means of unit vectors, not of unit length themselves.
        text_embeds (`torch.FloatTensor` of shape (C, 2, D)):
            Anchors of unit length, [normal, abnormal], a pair per class.
        router_logits (`tuple` of `torch.FloatTensor` of shape (B, N + 1, K), *optional*, on request):
            One a MoE layer; the class token comes first.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    anomaly_logits: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    patch_embeds: tuple[torch.Tensor, ...] | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


def unit_length(embeds: torch.Tensor) -> torch.Tensor:
    """Scale vectors (..., D) to length 1; the norm is taken in float32 and a vector of zeros stays zero."""
    return (embeds / vector_norm(embeds).clamp_min(1e-12)).to(embeds.dtype)


class MoECLIPTextAdapter(nn.Module):
    """The text adapter, in place of CLIP's text projection: (P, text width) -> (P, D)."""

    def __init__(self, config: MoECLIPConfig):
        super().__init__()
        self.projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.activation = nn.LeakyReLU(0.01)

    def forward(self, text_features: torch.Tensor) -> torch.Tensor:
        # Anchors are nearly parallel, and autocast's rounding is not small beside their difference.
        weight = self.projection.weight
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():  # a quantised one takes what comes
            text_features = text_features.to(weight.dtype)
        with without_autocast(text_features):
            return self.activation(self.projection(text_features))


class MoECLIPPatchProjection(nn.Module):
    """Patch average aggregation (PAA) of a tap, post-layernorm and projection to the embedding space."""

    def __init__(self, config: MoECLIPConfig):
        super().__init__()
        self.sizes = config.aggregation_sizes
        self.norm_eps = config.vision_config.layer_norm_eps
        self.shared = config.shared_projections
        num_projections = len(config.feature_layers) if self.shared else config.num_maps
        self.projections = nn.ModuleList(
            nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
            for _ in range(num_projections)
        )
        self.activation = nn.LeakyReLU(0.01) if config.projection_activation else nn.Identity()

    def forward(
        self, patches: torch.Tensor, normalised: torch.Tensor, norm_bias: torch.Tensor, tap: int
    ) -> list[torch.Tensor]:
        """
        Embed one tap's patches at every window size.

        Pooling comes last: centring and projecting are linear and commute with the mean over a window (its zero
        padding counted), so that one product serves all sizes and only the deviation is taken behind each pooling.

        Args:
            patches (`torch.Tensor`): (B, h, w, d), a tap without its class token.
            normalised (`torch.Tensor`): (B, h, w, d), the same behind CLIP's post-layernorm.
            norm_bias (`torch.Tensor`): (d,), what the post-layernorm makes of zeros.
            tap (`int`): the tap's place among the feature layers, from 0.

        Returns:
            One (B, N, D) of unit vectors a window size.
        """
        centred = patches - patches.mean(dim=-1, keepdim=True)

        def deviation(size: int) -> torch.Tensor:
            norm = vector_norm(average_pool(centred, size))
            return (norm.square() / centred.shape[-1] + self.norm_eps).sqrt()

        own_deviation = deviation(1)
        embeds = []
        for index, size in enumerate(self.sizes):
            if index == 0 or not self.shared:
                project = self.projections[tap if self.shared else tap * len(self.sizes) + index]
                projected, offset = project(normalised), project(norm_bias)
                scaled = (projected - offset) * own_deviation
            if size == 1:
                pooled = projected
            else:
                pooled = (average_pool(scaled, size) / deviation(size)).to(projected.dtype) + offset
            embeds.append(unit_length(self.activation(pooled)).flatten(1, 2))
        return embeds


def average_pool(grid: torch.Tensor, size: int) -> torch.Tensor:
    """Mean over the size x size neighbourhood of (B, h, w, channels), zero-padded, the padding counted in the mean."""
    if size == 1:
        return grid
    pooled = F.avg_pool2d(grid.permute(0, 3, 1, 2), size, stride=1, padding=size // 2)
    return pooled.permute(0, 2, 3, 1)


class MoECLIPDepthwiseAdapter(nn.Module):
    """The image embedding: a depth-wise convolution along the row-major patches, projected, averaged over them."""

    def __init__(self, config: MoECLIPConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.layer_norm = nn.LayerNorm(width)
        self.depthwise = nn.Conv1d(width, width, kernel_size=3, padding="same", groups=width, bias=False)
        self.activation = nn.GELU()
        self.pointwise = nn.Linear(width, config.projection_dim, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, d) patches behind the post-layernorm -> (B, D), the mean of unit vectors."""
        mixed = self.depthwise(self.layer_norm(patches).transpose(1, 2)).transpose(1, 2)
        return unit_length(self.pointwise(self.activation(mixed))).mean(dim=1)


class MoECLIPModel(CLIPModel):
    """
    MoECLIP over the two towers of a [`~transformers.CLIPModel`].

    `from_pretrained` takes a MoECLIP checkpoint, or a plain CLIP one of any size: then the MoECLIP parts are reported
    as new and start as the paper starts them. Call [`~MoECLIPModel.freeze_backbone`] before training.

    Args:
        config ([`MoECLIPConfig`])

    Example:

    ```python
    >>> from moeclip_hf import MoECLIPModel, MoECLIPProcessor

    >>> model = MoECLIPModel.from_pretrained("moeclip")
    >>> processor = MoECLIPProcessor.from_pretrained("moeclip")
    >>> outputs = model(**processor(images=image, text=["metal nut"], return_tensors="pt"))
    >>> result = processor.post_process_anomaly_detection(outputs, target_sizes=[(image.height, image.width)])[0]
    ```
    """

    config_class = MoECLIPConfig
    config: MoECLIPConfig
    base_model_prefix = "moeclip"
    main_input_name = "pixel_values"
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "MoECLIPVisionEmbeddings", "MoELora"]

    def __init__(self, config: MoECLIPConfig):
        super().__init__(config)
        vision_config: Any = config.vision_config
        width = vision_config.hidden_size
        self.vision_model.embeddings = MoECLIPVisionEmbeddings(vision_config)
        if vision_config.hidden_act == "quick_gelu":
            for block in self.vision_model.encoder.layers:
                block.mlp.activation_fn = MoECLIPQuickGELU()
        self.moe_layers = nn.ModuleList(
            MoELora(
                width,
                num_experts=config.num_experts,
                num_experts_per_tok=config.num_experts_per_tok,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                residual_weight=config.residual_weight,
                use_fofs=config.use_fofs,
            )
            for _ in config.moe_layers
        )
        self.text_adapter = MoECLIPTextAdapter(config)
        self.patch_projection = MoECLIPPatchProjection(config)
        self.depthwise_adapter = MoECLIPDepthwiseAdapter(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoELora):
            module.reset_parameters()
        elif isinstance(module, MoECLIPTextAdapter):
            _init_by_fan_in(module.projection)
        elif isinstance(module, MoECLIPPatchProjection):
            for projection in module.projections:
                _init_by_fan_in(projection)
        elif isinstance(module, MoECLIPDepthwiseAdapter):
            _init_by_fan_in(module.depthwise)
            _init_by_fan_in(module.pointwise)

    def freeze_backbone(self) -> "MoECLIPModel":
        """
        Leave nothing but MoECLIP's own parts to train: router, B (and A without FOFS), projections and both adapters.

        Loading does not keep `requires_grad`, so this is called on a loaded model, before its optimizer is made.

        Returns:
            The model itself.
        """
        self.requires_grad_(False)
        for part in (self.moe_layers, self.text_adapter, self.patch_projection, self.depthwise_adapter):
            part.requires_grad_(True)
        return self

    def get_prompt_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Run the text tower: features of the first end-of-text token behind the final layernorm.

        With a frozen tower they depend on nothing that trains: compute them once a class and pass them to
        [`~MoECLIPModel.pool_prompt_features`] in every step.

        Args:
            input_ids (`torch.Tensor`): (P, length).
            attention_mask (`torch.Tensor`, *optional*): (P, length); attention is causal, so padding changes nothing.

        Returns:
            `torch.Tensor` of shape (P, text width).
        """
        return self.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    def pool_prompt_features(
        self, prompt_features: torch.Tensor, prompt_groups: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Make the anchors: text adapter, unit length a sentence, mean over a group's sentences, unit length.

        Args:
            prompt_features (`torch.Tensor`): (P, text width), from [`~MoECLIPModel.get_prompt_features`].
            prompt_groups (`torch.Tensor`): (P,), 2c for a normal, 2c + 1 for an abnormal sentence of class c.

        Returns:
            `torch.Tensor` of shape (C, 2, D), [normal, abnormal].

        Raises:
            ValueError: if a class has no normal or no abnormal sentence, or the groups are not given.
        """
        if prompt_groups is None:
            raise ValueError("prompt_groups is missing: pass on all that the processor returns for `text`.")
        if prompt_groups.shape != prompt_features.shape[:1]:
            raise ValueError(
                f"prompt_groups {tuple(prompt_groups.shape)} must hold one group for each of the "
                f"{len(prompt_features)} sentences."
            )
        num_groups = 2 * (int(prompt_groups.max()) // 2 + 1)
        counts = prompt_groups.bincount(minlength=num_groups)
        if not counts.all():
            raise ValueError(
                f"Every class needs normal and abnormal sentences; prompt_groups counts {counts.tolist()}."
            )
        sentences = unit_length(self.text_adapter(prompt_features))
        prompt_groups = prompt_groups.to(sentences.device)  # a device map may put the text adapter elsewhere
        sums = sentences.new_zeros(num_groups, sentences.shape[-1]).index_add(0, prompt_groups, sentences)
        return unit_length(sums).unflatten(0, (-1, 2))

    def get_text_embeds(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt_groups: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Compute the anchors of some classes, once; pass them back as `text_embeds`.

        Args:
            input_ids (`torch.Tensor`): (P, length).
            attention_mask (`torch.Tensor`, *optional*): (P, length).
            prompt_groups (`torch.Tensor`): (P,), 2c for a normal, 2c + 1 for an abnormal sentence of class c.

        Returns:
            `torch.Tensor` of shape (C, 2, D), [normal, abnormal].
        """
        return self.pool_prompt_features(self.get_prompt_features(input_ids, attention_mask), prompt_groups)

    def _score_patches(
        self, patches: torch.Tensor, tap: int, grid: tuple[int, int], direction: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        Embed a tap's patches (B, N, d) at every window size, (B, N, D) each, and compare them with the anchors.

        Returns:
            The embeddings, and their products (B, N) with the difference (B, D, 1) of the anchors.
        """
        # Modules are called, not read: hooks may have to bring their weights from elsewhere.
        post_layernorm = self.vision_model.post_layernorm
        norm_bias = post_layernorm(torch.zeros_like(patches[0, 0]))
        normalised = post_layernorm(patches).unflatten(1, grid)
        patch_embeds = self.patch_projection(patches.unflatten(1, grid), normalised, norm_bias, tap)
        wide = [in_float32(embeds) for embeds in patch_embeds]
        direction = direction.to(wide[0])
        with without_autocast(direction):
            return patch_embeds, [(embeds @ direction).squeeze(-1) for embeds in wide]

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_groups: torch.Tensor | None = None,
        prompt_features: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        class_index: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        output_router_logits: bool = False,
    ) -> MoECLIPOutput:
        """
        Score images against the anchors of their classes.

        Args:
            pixel_values (`torch.FloatTensor`): (B, 3, H, W), normalised; any size of at least one patch. Pixels beyond
                the last whole patch are not seen.
            input_ids, attention_mask, prompt_groups: sentences, as in [`~MoECLIPModel.get_text_embeds`].
            prompt_features (`torch.FloatTensor`): (P, text width), the sentences' features computed before by
                [`~MoECLIPModel.get_prompt_features`], instead of `input_ids`: what training passes.
            text_embeds (`torch.FloatTensor`): (C, 2, D), anchors computed before, instead of sentences.
            class_index (`torch.LongTensor`, *optional*): (B,), the class of each image. Without it: the only class
                there is, or class j for image j where there are as many classes as images.
            labels (`torch.LongTensor`, *optional*): (B,), 0 normal or 1 abnormal.
            masks (`torch.Tensor`, *optional*): (B, H, W) or (B, 1, H, W), 0 normal, else abnormal; of any size.
            output_router_logits (`bool`): also return the routers' logits.
            return_dict (`bool`, *optional*): `False` for a tuple.

        Hidden states and attentions of single blocks are not returned; the two towers return theirs.

        Returns:
            [`MoECLIPOutput`]
        """
        if pixel_values is None:
            raise ValueError("pixel_values is missing: pass on all that the processor returns for `images`.")
        patch_size: Any = self.config.vision_config.patch_size
        grid = pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size
        if not all(grid):
            raise ValueError(
                f"Images of {tuple(pixel_values.shape[-2:])} pixels hold no patch of {patch_size} pixels."
            )
        _check_targets(len(pixel_values), labels, masks)
        if text_embeds is None:
            if input_ids is None and prompt_features is None:
                raise ValueError("Pass either input_ids with prompt_groups (sentences) or text_embeds (anchors).")
            if prompt_features is None:
                prompt_features = self.get_prompt_features(input_ids, attention_mask)
            text_embeds = self.pool_prompt_features(prompt_features, prompt_groups)
        anchors = _anchors_of_images(text_embeds, class_index, len(pixel_values))

        with_targets = labels is not None or masks is not None
        anchors = in_float32(anchors)
        direction = (anchors[:, 1] - anchors[:, 0]).unsqueeze(-1)
        # Windows overlap: what they keep for the backward pass is many times what they are made of.
        is_recorded = self.training and torch.is_grad_enabled()
        score_patches = (
            partial(checkpoint, self._score_patches, use_reentrant=False) if is_recorded else self._score_patches
        )

        tower, layers = self.vision_model, self.config.feature_layers
        moe_layers = dict(zip(self.config.moe_layers, self.moe_layers, strict=True))
        depth = max(layers[-1], *(block + 1 for block in moe_layers), 0)
        patch_embeds: list[torch.Tensor] = []
        patch_logits: list[torch.Tensor] = []
        hidden_states = tower.pre_layrnorm(tower.embeddings(pixel_values, interpolate_pos_encoding=True))
        # A block that a PEFT adapter wraps returns what its experts made of it, and records the rest.
        with record_outputs(tower) as adapted:
            for layer, block in enumerate(tower.encoder.layers[:depth], start=1):
                hidden_states = block(hidden_states, None)
                if layer - 1 in moe_layers:
                    adapted.append(moe_layers[layer - 1](hidden_states, with_targets and self.training))
                    hidden_states = adapted[-1].hidden_states
                if layer not in layers:
                    continue
                # Scored here, so that a tap's gradients do not wait for those of all others.
                patches = hidden_states[:, 1:]
                embeds, logits = score_patches(patches, layers.index(layer), grid, direction)
                patch_embeds += embeds
                patch_logits += logits
                if layer == self.config.image_feature_layer:
                    image_embeds = self.depthwise_adapter(tower.post_layernorm(patches))
        anomaly_logits = _PATCH_LOGIT_SCALE * torch.stack(patch_logits, dim=1).unflatten(2, grid)
        images = in_float32(image_embeds)
        with without_autocast(images):
            logits_per_image = torch.einsum("bd,bsd->bs", images, anchors.to(images))

        losses = self._losses(anomaly_logits, logits_per_image, adapted, labels, masks) if with_targets else None
        return MoECLIPOutput(
            loss=self._weighted_sum(losses) if losses else None,
            losses=losses,
            anomaly_logits=anomaly_logits,
            logits_per_image=logits_per_image,
            patch_embeds=tuple(patch_embeds),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            router_logits=tuple(layer.router_logits for layer in adapted) if output_router_logits else None,
        )

    def _losses(self, anomaly_logits, logits_per_image, adapted, labels, masks) -> dict[str, torch.Tensor]:
        """The unweighted terms that the given targets allow, all on the device of the anomaly logits."""
        losses = {}
        if masks is not None:
            losses["segmentation"] = segmentation_loss(anomaly_logits, masks.to(anomaly_logits.device))
        if labels is not None:
            classification = classification_loss(logits_per_image, labels.to(logits_per_image.device))
            losses["classification"] = classification.to(anomaly_logits.device)
        for name, terms in (("etf", [a.etf_loss for a in adapted]), ("balance", [a.balance_loss for a in adapted])):
            live = [term.to(anomaly_logits.device) for term in terms if term is not None]
            losses[name] = torch.stack(live).sum() if live else anomaly_logits.new_zeros(())
        return losses

    def _weighted_sum(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """L = L_seg + L_ac + the ETF and the balance term by their coefficients."""
        weights = {"etf": self.config.etf_loss_coef, "balance": self.config.router_aux_loss_coef}
        return torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()


def _check_targets(num_images: int, labels: torch.Tensor | None, masks: torch.Tensor | None) -> None:
    """Refuse labels and masks that torch would broadcast over images they do not belong to."""
    if labels is not None and labels.shape != (num_images,):
        raise ValueError(f"labels {tuple(labels.shape)} must be ({num_images},), one an image.")
    if masks is None:
        return
    shape = tuple(masks.shape)
    if shape[0] != num_images or not (len(shape) == 3 or (len(shape) == 4 and shape[1] == 1)):
        raise ValueError(f"masks {shape} must be ({num_images}, H, W) or ({num_images}, 1, H, W).")


def _init_by_fan_in(module: nn.Module) -> None:
    """Draw a weight so that it keeps its input's variance: N(0, 1 / fan-in)."""
    weight: Any = module.weight
    init.normal_(weight, std=weight[0].numel() ** -0.5)


def _anchors_of_images(text_embeds: torch.Tensor, class_index: torch.Tensor | None, num_images: int) -> torch.Tensor:
    """Pick each image's pair of anchors: (C, 2, D) and (B,) give (B, 2, D)."""
    if text_embeds.dim() != 3 or text_embeds.shape[1] != 2:
        raise ValueError(f"text_embeds {tuple(text_embeds.shape)} must be (classes, 2, width): [normal, abnormal].")
    if class_index is not None:
        if class_index.shape != (num_images,) or not ((class_index >= 0) & (class_index < len(text_embeds))).all():
            raise ValueError(
                f"class_index {class_index.tolist()} must name one of {len(text_embeds)} classes, from 0, for each of "
                f"{num_images} images."
            )
        return text_embeds[class_index.to(text_embeds.device)]
    if len(text_embeds) not in (1, num_images):
        raise ValueError(
            f"There are {len(text_embeds)} classes and {num_images} images: pass class_index, the class of each image."
        )
    return text_embeds.expand(num_images, -1, -1)


__all__ = ["MoECLIPModel", "MoECLIPOutput"]
