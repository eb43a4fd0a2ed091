"""Names and shapes of the autoencoder of Stable Diffusion as diffusers stores it, small: 32 to 128 wide."""

from safetensors.torch import save_file

from support.released_var import released

FILE = "diffusion_pytorch_model.safetensors"
WIDTHS, DIM = (32, 64, 128, 128), 4


def autoencoder_shapes():
    out = {}

    def part(name, *shape):
        out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]

    def block(name, before, after):
        part(f"{name}.norm1", before)
        part(f"{name}.conv1", after, before, 3, 3)
        part(f"{name}.norm2", after)
        part(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            part(f"{name}.conv_shortcut", after, before, 1, 1)

    def middle(side, width):
        for one in ("to_q", "to_k", "to_v", "to_out.0"):
            part(f"{side}.mid_block.attentions.0.{one}", width, width)
        part(f"{side}.mid_block.attentions.0.group_norm", width)
        for j in range(2):
            block(f"{side}.mid_block.resnets.{j}", width, width)

    part("quant_conv", 2 * DIM, 2 * DIM, 1, 1)
    part("post_quant_conv", DIM, DIM, 1, 1)
    for side, kind, widths in (("encoder", "down", WIDTHS), ("decoder", "up", WIDTHS[::-1])):
        up = side == "decoder"
        before = widths[0]
        part(f"{side}.conv_in", before, DIM if up else 3, 3, 3)
        for i, width in enumerate(widths):
            for j in range(2 + up):
                block(f"{side}.{kind}_blocks.{i}.resnets.{j}", before, width)
                before = width
            if i < len(widths) - 1:
                part(f"{side}.{kind}_blocks.{i}.{kind}samplers.0.conv", width, width, 3, 3)
        middle(side, WIDTHS[-1])
        part(f"{side}.conv_norm_out", before)
        part(f"{side}.conv_out", 3 if up else 2 * DIM, before, 3, 3)
    return out


def store(place):
    """The file in a folder, under its usual name."""
    save_file(released(autoencoder_shapes()), place / FILE)
