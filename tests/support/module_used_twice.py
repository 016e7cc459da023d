"""Run by the launcher: one step of a module that calls a layer twice, against the same step without any engine."""

import sys
from dataclasses import replace

import torch
from torch import nn

from vlatune.train.engine import make_accelerator, prepare
from vlatune.train.recipes import load_recipe

RATE = 0.1


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x))))).square().mean()


def main() -> None:
    engine = next(argument for argument in sys.argv[1:] if not argument.startswith("--"))
    config = replace(load_recipe("tiny"), engine=engine, batch_size=2)
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    plain, model = Twice(), Twice()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 6)  # a row of samples for each rank
    loss = (plain(x[0]) + plain(x[1])) / 2
    loss.backward()
    expected = {name: p.detach() - RATE * p.grad for name, p in plain.named_parameters()}
    settings = replace(config.optimizer, gradient_clip_norm=1e6)
    engine_model, optimizer = prepare(accelerator, model, torch.optim.SGD(model.parameters(), lr=RATE), settings)
    accelerator.backward(engine_model(x[accelerator.process_index]))
    optimizer.step()
    found = accelerator.get_state_dict(engine_model, unwrap=True)
    if accelerator.is_main_process or found:  # under ZeRO-3 the main rank alone has it
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    print(f"rank {accelerator.process_index} agrees", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
