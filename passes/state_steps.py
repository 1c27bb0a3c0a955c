"""Make a graph of one token one of T tokens, where layers keep state: all tokens at once, but states step by step."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import CodeGen
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import aten, describe, find_calls, finish, get_tensor, graph_sizes, value_of
from .logit_rows import logits_linear


class StateStepsError(ValueError):
    """A state that cannot be moved on by itself."""


class StateSteps(nn.Module):
    """Moves one state on, token by token, and keeps what it is after each.

    ``step(state (B, ...), *inputs) -> (new state, *outputs)`` is of one token and has no tensors of its own;
    ``is_token`` tells which inputs are the token's, and which all tokens share.
    """

    def __init__(self, step: fx.GraphModule, is_token: Sequence[bool]) -> None:
        super().__init__()
        self.step = step
        self.is_token = tuple(is_token)
        # It writes states.
        self._is_impure = True

    def forward(self, states: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Step from ``states[:, 0]`` on and write ``states[:, t + 1]`` after token t.

        Args:
            states: ``(B, S, ...)``, S more than T; mutated.
            inputs: those of tokens are ``(B * T, ...)``.

        Returns:
            The outputs, ``(B * T, ...)`` each.
        """
        outputs = []
        for token, of_step in enumerate(self._tokens(states.shape[0], inputs)):
            new, *made = self.step(states[:, token], *of_step)
            states[:, token + 1] = new
            outputs.append(made)
        return _of_rows(outputs)

    def _tokens(self, batch: int, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The inputs of each step."""
        given = list(zip(inputs, self.is_token, strict=True))
        tokens = next(x for x, of_token in given if of_token).shape[0] // batch
        rows = [(x.unflatten(0, (batch, tokens)) if of_token else x, of_token) for x, of_token in given]
        for token in range(tokens):
            yield [x[:, token].contiguous() if of_token else x for x, of_token in rows]


class StateFill(StateSteps):
    """The same over a prompt, of which the state after the last token alone is kept."""

    def forward(self, states: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Step from ``states[:, 0]`` on and write there what it is after the new tokens.

        Args:
            states: ``(B, S, ...)``; mutated.
            inputs: ``num_new (B,)`` int64, how many tokens of each row are not padding, and those of the steps.

        Returns:
            The outputs, ``(B * T, ...)`` each.
        """
        num_new, *of_steps = inputs
        state, outputs = states[:, 0], []
        for token, of_step in enumerate(self._tokens(states.shape[0], of_steps)):
            new, *made = self.step(state, *of_step)
            is_new = (num_new > token).view(-1, *[1] * (new.dim() - 1))
            state = torch.where(is_new, new, state)
            outputs.append(made)
        made_of_rows = _of_rows(outputs)
        # The first token's outputs may be a view of it.
        states[:, 0] = state
        return made_of_rows


def _of_rows(outputs: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """What every token made, side by side."""
    return tuple(torch.stack(made, 1).flatten(0, 1) for made in zip(*outputs, strict=True))


class FillStates(PassBase):
    """Matches the :class:`StateSteps` of a prefill's graph, writes a :class:`StateFill` of ``num_new`` for each.

    Requires that attention is lowered, which makes that input. A prompt's states move on token by token, too.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        (num_new,) = graph.find_nodes(op="placeholder", target="num_new")
        calls = [
            node
            for node in graph.find_nodes(op="call_module")
            if type(graph_module.get_submodule(str(node.target))) is StateSteps
        ]
        for node in calls:
            steps: Any = graph_module.get_submodule(str(node.target))
            graph_module.add_submodule(str(node.target), StateFill(steps.step, steps.is_token))
            states, *inputs = node.args
            node.args = (states, num_new, *inputs)
        finish(graph_module)
        return PassResult(graph_module, bool(calls))


class StepStates(PassBase):
    """Matches a graph ``(input_ids (N, 1), position_ids (N, 1), *states (N, ...)) -> (logits, *states)`` of one token;
    writes ``(input_ids (B, T), position_ids (B, T), *states (B, S, ...)) -> logits (B, T, V)``.

    N becomes B * T: nothing but attention and states sees more than its own row. Markers get their tokens side by side;
    the nodes between a state and its successor become a :class:`StateSteps`, which writes the states after each token.

    Requires a functional graph and a language-model head. Ensures that there is one region for each state, else raises
    :class:`StateStepsError`.
    """

    def __init__(self, num_states: int) -> None:
        """``num_states``: inputs that are states."""
        super().__init__()
        self.num_states = num_states

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        for node in find_calls(graph, aten._assert_tensor_metadata.default):
            graph.erase_node(node)
        for node in find_calls(graph, aten.view.default):
            # Rows of one token lie otherwise in memory than those of many.
            node.target = aten.reshape.default
        ids, positions, *states = graph.find_nodes(op="placeholder")
        with graph.inserting_after(ids):
            rows = graph.call_function(aten.sym_size.int, (ids, 0))
        rows.meta["val"] = ids.meta["val"].shape[0]
        for node in find_calls(graph, aten.sym_size.int):
            if node is not rows and _is_rows(node, ids):
                node.replace_all_uses_with(rows)
                graph.erase_node(node)
        output = graph.output_node()
        results: Any = output.args[0]
        logits, *successors = results
        output.args = (logits,)
        # The export's knows the inputs and outputs that there were.
        graph.set_codegen(CodeGen())
        for number, (state, successor) in enumerate(zip(states, successors, strict=True)):
            self._cut_out(graph_module, f"state_steps_{number}", ids, state, successor)
        with graph.inserting_before(states[0].next if states else ids.next):
            sizes = [graph.call_function(aten.sym_size.int, (ids, axis)) for axis in (0, 1)]
            for x in (ids, positions):
                flat = graph.call_function(aten.reshape.default, (x, [-1, 1]))
                x.replace_all_uses_with(flat, delete_user_cb=lambda user, flat=flat: user not in (flat, *sizes))
        for marker in find_calls(graph, torch.ops.quantspec.attention.default):
            self._gather_tokens(graph, marker, sizes)
        head = logits_linear(graph)
        if head is not None:
            with graph.inserting_before(head):
                width = head.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
                hidden = graph.call_function(aten.reshape.default, (head.args[0], [*sizes, width]))
            head.update_arg(0, hidden)
        _put_in_order(graph)
        graph.lint()
        graph.eliminate_dead_code()
        graph_module.recompile()
        placeholders = graph.find_nodes(op="placeholder")
        _Values(graph_module).run(*placeholders)
        return PassResult(graph_module, True)

    def _gather_tokens(self, graph: fx.Graph, marker: fx.Node, sizes: list[fx.Node]) -> None:
        with graph.inserting_before(marker):
            for place in range(3):
                x = marker.args[place]
                heads, _, dim = x.meta["val"].shape[1:]  # type: ignore[union-attr]
                tokens = graph.call_function(aten.reshape.default, (x, [*sizes, heads, dim]))
                marker.update_arg(place, graph.call_function(aten.transpose.int, (tokens, 1, 2)))
        with graph.inserting_after(marker):
            rows = graph.call_function(aten.reshape.default)
        marker.replace_all_uses_with(rows)
        rows.args = (marker, [-1, 1, *marker.meta["val"].shape[2:]])

    def _cut_out(
        self, graph_module: fx.GraphModule, name: str, ids: fx.Node, state: fx.Node, successor: fx.Node
    ) -> None:
        """Replace what leads from ``state`` to ``successor`` by a :class:`StateSteps`."""
        graph = graph_module.graph
        later, earlier = _reached(state, lambda node: node.users), _reached(successor, lambda n: n.all_input_nodes)
        region = [node for node in graph.nodes if node in later and node in earlier]
        if successor not in region:
            raise StateStepsError(f"{describe(successor)} is a state that does not follow from the one before")
        inputs: list[fx.Node] = []
        step = fx.Graph()
        copied = {state: step.placeholder("state")}
        size = step.call_function(aten.sym_size.int, (copied[state], 0))

        def copy_of(node: fx.Node) -> fx.Node:
            if node not in copied:
                if isinstance(node.meta.get("val"), torch.SymInt | int):
                    # Sizes follow from the number of rows, which is another in the region.
                    copied[node] = size if _is_rows(node, ids) else step.node_copy(node, copy_of)
                else:
                    inputs.append(node)
                    with step.inserting_before(size):
                        copied[node] = step.placeholder(f"input_{len(inputs)}")
            return copied[node]

        for node in region[1:]:
            copied[node] = step.node_copy(node, copy_of)
        used = [node for node in region if any(user not in region for user in node.users) and node is not state]
        previous = [user for user in state.users if user not in region and user.op != "output"]
        made = [*used, *([state] if previous else [])]
        step.output((copied[successor], *(copied[node] for node in made)))
        for node in step.nodes:
            # Of the rows of the graph it is taken from.
            node.meta.pop("val", None)
        step.lint()
        is_token = [_has_rows(node) for node in inputs]
        if not any(is_token):
            raise StateStepsError(f"{describe(successor)} is a state that no token changes")
        graph_module.add_module(name, StateSteps(fx.GraphModule({}, step), is_token))
        with graph.inserting_after(successor):
            call = graph.call_module(name, (state, *inputs))
        call.meta["outputs"] = [node.meta["val"] for node in made]
        call.meta["nn_module_stack"] = successor.meta.get("nn_module_stack")
        for index, node in enumerate(made):
            with graph.inserting_after(call):
                taken = graph.call_function(operator.getitem, (call, index))
            outside = set(region) | {call}
            node.replace_all_uses_with(taken, delete_user_cb=lambda user, inside=outside: user not in inside)


def _reached(start: fx.Node, following: Any) -> set[fx.Node]:
    found: set[fx.Node] = {start}
    waiting = [start]
    while waiting:
        for node in following(waiting.pop()):
            if node not in found and node.op != "output":
                found.add(node)
                waiting.append(node)
    return found


def _has_rows(node: fx.Node) -> bool:
    """Whether a node's first axis is that of the rows, which alone varies."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0 and isinstance(value.shape[0], torch.SymInt)


def _is_rows(node: fx.Node, ids: fx.Node) -> bool:
    """Whether a node is the number of rows."""
    value = node.meta["val"]
    return isinstance(value, torch.SymInt) and value.node.expr == ids.meta["val"].shape[0].node.expr


def _put_in_order(graph: fx.Graph) -> None:
    """Put every node behind what it reads, and else leave the order as it is."""
    done: dict[fx.Node, bool] = {}

    def place(node: fx.Node) -> None:
        if not done.setdefault(node, False):
            for source in node.all_input_nodes:
                if done.get(source) is False:
                    raise StateStepsError(f"{describe(source)} is a state that depends on another that depends on it")
                if source not in done:
                    place(source)
            output.prepend(node)
            done[node] = True

    output = graph.output_node()
    for node in list(graph.nodes):
        if node is not output and node not in done:
            place(node)


class _Values(fx.Interpreter):
    """Gives every node its value metadata, with B and T dynamic."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        shape_env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
        self.sizes: Mapping[str, Any] = graph_sizes(shape_env)

    def run_node(self, n: fx.Node) -> Any:
        batch, tokens, slots = self.sizes.values()
        before: Any = n.meta.get("val")
        result: Any
        if n.op == "placeholder":
            is_state = n.target not in ("input_ids", "position_ids")
            result = self._empty(before, (batch, slots, *before.shape[1:]) if is_state else (batch, tokens))
        elif n.op == "get_attr":
            result = self.mode.from_tensor(get_tensor(self.module, n), static_shapes=True)  # type: ignore[arg-type]
        elif n.op == "call_module":
            result = tuple(self._empty(value, (batch * tokens, *value.shape[1:])) for value in n.meta["outputs"])
        else:
            result = value_of(self.mode, super().run_node, n)
        n.meta["val"] = result
        return result

    def _empty(self, like: Any, shape: tuple[Any, ...]) -> Tensor:
        with self.mode:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
