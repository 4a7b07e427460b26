"""A mixture of experts on the tokens of one image beside the two matrix products that it cannot do without.

    python -m benchmarks.moe_layer [--tokens 1370] [--width 1024] [--rounds 50]

The products are those of all experts' A and B stacked into one, K r = 32 wide, as a plain LoRA of that rank would do
them. The layer also routes, picks the k largest, scales, matches norms and adds.
"""

import torch

from benchmarks.alternating import alternate, ratio
from benchmarks.report import Goal, Report, argument_parser, publish, timing_rows
from moeclip_hf.modeling.moe_lora import MoELora

PRODUCTS, LAYER = "two matrix products", "mixture of experts"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=1370)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--calls", type=int, default=10, help="a round")
    args = parser.parse_args()

    torch.manual_seed(0)
    layer = MoELora(args.width).eval()
    layer.reset_parameters()
    torch.nn.init.normal_(layer.router.weight, std=0.02)
    torch.nn.init.normal_(layer.lora_B, std=0.02)
    hidden_states = torch.randn(1, args.tokens, args.width)
    down = layer.lora_A.flatten(0, 1)
    up = layer.lora_B.permute(1, 0, 2).flatten(1).contiguous()

    def products() -> None:
        for _ in range(args.calls):
            torch.nn.functional.linear(torch.nn.functional.linear(hidden_states, down), up)

    def experts() -> None:
        for _ in range(args.calls):
            layer(hidden_states)

    with torch.inference_mode():
        seconds = alternate({PRODUCTS: products, LAYER: experts}, args.rounds)
    title = f"{args.calls} calls on {args.tokens} tokens of width {args.width}, float32"
    goal = Goal("mixture of experts over its two matrix products", ratio(seconds, LAYER, PRODUCTS), 1.5)
    publish([Report(title, timing_rows(seconds, PRODUCTS, digits=4), [goal])], args.output)


if __name__ == "__main__":
    main()
