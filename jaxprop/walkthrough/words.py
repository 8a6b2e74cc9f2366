"""The walkthrough's words in each of its languages, keyed by the English ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

Language = Literal["en", "ko"]

LANGUAGES: dict[Language, str] = {"en": "English", "ko": "한국어"}

Say = Callable[..., str]
"""A function ``say(english, **values)`` that returns the words with the values put in."""

PARTICLES = {
    "은(는)": ("은", "는"),
    "이(가)": ("이", "가"),
    "을(를)": ("을", "를"),
    "과(와)": ("과", "와"),
    "(으)로": ("으로", "로"),
}
"""Korean particles in the catalogue, each in its form after a consonant and after a vowel."""

KOREAN = {
    # the terminal
    "The network": "신경망",
    "Forward": "순전파",
    " (step 1 of {steps})": " ({steps}번의 갱신 중 1번째)",
    "By layer": "층별 요약",
    "units": "유닛",
    "weights": "가중치",
    "largest z": "최대 z",
    "slope 0": "기울기 0",
    "largest ∂E/∂w": "최대 ∂E/∂w",
    "of": "가중치 이름",
    "Below, at most {layers} layers, {units} units and {chains} weights a layer. --all prints "
    "everything, --weight {name} one weight, --json is for scripts.": (
        "아래에는 층 {layers}개, 층마다 유닛 {units}개와 가중치 {chains}개까지만 나옵니다. 전부 "
        "보려면 --all, 한 가중치만 보려면 --weight {name}, 스크립트에는 --json을 쓰세요."
    ),
    "… and {count} more unit": "… 그 밖에 유닛 {count}개",
    "… and {count} more units": "… 그 밖에 유닛 {count}개",
    "… and {count} more weight; the largest product is {product}, of {name}": (
        "… 그 밖에 가중치 {count}개; 가장 큰 곱은 {name}의 {product}"
    ),
    "… and {count} more weights; the largest product is {product}, of {name}": (
        "… 그 밖에 가중치 {count}개; 가장 큰 곱은 {name}의 {product}"
    ),
    "Back to the {layer} weights": "{layer} 가중치까지 역전파",
    "The check": "검산",
    "After {steps} steps": "{steps}번의 갱신 뒤",
    "the bias": "편향",
    "from {source}": "{source}에서",
    "{name}, {source} to {unit} ({layer} layer)": "{name}, {source} {unit}(으)로 ({layer}층)",
    "by hand": "손으로 유도한 값",
    "by jax.grad": "jax.grad의 값",
    "new {name}": "새 {name}",
    "{count} input": "입력 {count}개",
    "{count} inputs": "입력 {count}개",
    "{count} {layer} unit ({activation})": "{layer} 유닛 {count}개 ({activation})",
    "{count} {layer} units ({activation})": "{layer} 유닛 {count}개 ({activation})",
    "hidden": "은닉",
    "hidden-{number}": "은닉-{number}",
    "output": "출력",
    "no bias": "편향 없음",
    "error E = Σ ½ (t − o)², learning rate {rate}, float64": (
        "오차 E = Σ ½ (t − o)², 학습률 {rate}, float64"
    ),
    "In arrays z = x @ w, with a column for each unit:": ("배열로는 z = x @ w, 유닛마다 열 하나:"),
    "and the error reaches a hidden unit through every weight that it feeds:": (
        "은닉 유닛의 오차는 그 유닛이 이어진 모든 가중치를 거쳐 돌아옵니다:"
    ),
    "with ∂E/∂o = o − t, and the same for the others:": (
        "여기서 ∂E/∂o = o − t 이고, 나머지도 같습니다:"
    ),
    "product": "곱",
    "new": "새 값",
    "Forward again, with the new weights:": "새 가중치로 다시 순전파:",
    "E before {error}": "갱신 전 E {error}",
    "E after  {error}": "갱신 후 E {error}",
    "the error fell": "오차가 줄었습니다",
    "the error grew": "오차가 늘었습니다",
    "the error is the same": "오차가 그대로입니다",
    "the error is no longer finite": "오차가 더는 유한하지 않습니다",
    "the error is not finite": "오차가 유한하지 않습니다",
    "By hand and by jax.grad, the largest difference over {count} weight: {difference}": (
        "손으로 유도한 값과 jax.grad의 최대 차이 (가중치 {count}개): {difference}"
    ),
    "By hand and by jax.grad, the largest difference over {count} weights: {difference}": (
        "손으로 유도한 값과 jax.grad의 최대 차이 (가중치 {count}개): {difference}"
    ),
    "The article behind this example prints z2 = 0.10988248 and o2 = 0.66296548": (
        "이 예제의 원문에는 z2 = 0.10988248, o2 = 0.66296548로 인쇄되어 있으나"
    ),
    "here: misprints, since its own h2 and E_o2 agree with the values above.": (
        "오식입니다. 원문의 h2와 E_o2는 위의 값과 일치합니다."
    ),
    "step {taken}": "{taken}번째",
    "What stands out": "눈에 띄는 점",
    "{names} and {count} more": "{names} 외 {count}개",
    "After {steps} steps: {paragraph}": "{steps}번의 갱신 뒤: {paragraph}",
    "{name} is {number}: overflow. The largest number of float64 is 1.8e+308, and what is "
    "computed from {name} is inf or nan as well. Try smaller inputs, targets or weights.": (
        "{name} = {number}: 오버플로. float64의 가장 큰 수는 1.8e+308이며, 이 값에서 계산한 수도 "
        "모두 inf나 nan이 됩니다. 입력, 목표, 가중치를 더 작게 해 보세요."
    ),
    "Saturated in the {layer} layer: {units} ({count} of {all}). There the slope of {activation} "
    "is below {least}, so that hardly any error comes back and their weights hardly move. Try "
    "smaller inputs or weights.": (
        "{layer}층에서 포화: {units} (유닛 {all}개 중 {count}개). 여기서 {activation}의 기울기가 "
        "{least}보다 작아, 오차가 거의 돌아오지 않고 가중치도 거의 움직이지 않습니다. 입력이나 "
        "가중치를 더 작게 해 보세요."
    ),
    "Dead for this example in the {layer} layer: {units} ({count} of {all}). Their z is not above "
    "0, where relu is flat, so that no error comes back through them and their weights do not "
    "move.": (
        "{layer}층에서 이 예제에 대해 죽은 유닛: {units} (유닛 {all}개 중 {count}개). z가 0보다 "
        "크지 않아 relu가 평평하므로, 오차가 지나가지 못하고 가중치도 움직이지 않습니다."
    ),
    "All units of the {layer} layer are dead: {units}. Their z is not above 0, where relu is flat, "
    "so that no error comes back through them: neither their weights nor any below them move. Try "
    "other weights or biases, or gelu in the place of relu; if they died on the way, a smaller "
    "learning rate.": (
        "{layer}층의 모든 유닛이 죽었습니다: {units}. z가 0보다 크지 않아 relu가 평평하므로 오차가 "
        "지나가지 못하고, 이 층과 그 아래의 가중치가 움직이지 않습니다. 다른 가중치나 편향, 또는 "
        "relu 대신 gelu를 써 보세요. 갱신하는 동안 죽었다면 학습률을 줄여 보세요."
    ),
    "The learning rate is 0: no weight moves.": (
        "학습률이 0이므로 어떤 가중치도 움직이지 않습니다."
    ),
    "E is 0: every output is its target, and nothing is left to learn.": (
        "E가 0입니다. 모든 출력이 목표와 같아 더 배울 것이 없습니다."
    ),
    "Every derivative is 0: no weight moves, in this step or any other.": (
        "모든 미분값이 0이므로, 몇 번을 갱신해도 가중치가 움직이지 않습니다."
    ),
    "The descent diverges: after step {step} E is no longer finite. Every step overshoots, the "
    "next one further, until the numbers are too large for float64 (1.8e+308).": (
        "경사 하강이 발산합니다. {step}번째 갱신 뒤로 E가 유한하지 않습니다. 갱신할 때마다 목표를 "
        "더 멀리 지나쳐, 결국 float64(1.8e+308)의 범위를 벗어납니다."
    ),
    "E grew from {before} to {after}.": "E가 늘었습니다: {before} → {after}.",
    "On the way E grew to {highest}, at step {peak}.": (
        "도중에 E가 늘었습니다: {peak}번째 갱신 뒤 {highest}."
    ),
    "The learning rate is negative, and every step goes uphill: make it positive.": (
        "학습률이 음수라서 갱신할 때마다 오르막으로 갑니다. 양수로 바꾸세요."
    ),
    "The steps are too long. Try a smaller learning rate, such as {rate}.": (
        "한 걸음이 너무 큽니다. {rate}처럼 더 작은 학습률을 써 보세요."
    ),
    # the page
    "Backpropagation, one number at a time": "역전파, 한 숫자씩",
    "Every number is from one walk forward and back, every derivative by jax.grad as well.": (
        "모든 숫자는 한 번의 순전파와 역전파에서 나왔고, 기울기는 jax.grad로도 구했습니다."
    ),
    "Previous": "이전",
    "Next": "다음",
    "Stage": "단계",
    "Step of descent": "경사 하강 횟수",
    "{i} of {n}": "{n} 중 {i}",
    "Arrow keys: left and right for the stage, up and down for the step of descent.": (
        "화살표 키: 왼쪽·오른쪽은 단계, 위·아래는 경사 하강 횟수."
    ),
    "A line is a weight, the thicker the larger: click it for its stage, drag its number.": (
        "선은 가중치이며 클수록 굵습니다. 누르면 그 단계로 가고, 숫자를 끌면 값이 바뀝니다."
    ),
    "The number after ∂ at a unit is the derivative of the error by its value.": (
        "유닛의 ∂ 뒤의 수는 오차를 그 값으로 미분한 것입니다."
    ),
    "∂E/∂w is how fast the error E changes as w alone changes.": (
        "∂E/∂w는 w만 바꿀 때 오차 E가 얼마나 빠르게 변하는가를 나타냅니다."
    ),
    "Play": "재생",
    "Pause": "일시 정지",
    "Layers": "층",
    "Stages of this layer": "이 층의 단계",
    "Change a value": "값 바꾸기",
    "Name": "이름",
    "Value": "값",
    "Drag the value": "값을 끌어서 바꾸기",
    "Reset": "처음 값으로",
    "learning rate": "학습률",
    "inputs": "입력",
    "targets": "목표",
    "{layer} layer": "{layer}층",
    "Weights and biases are those at the start of the descent.": (
        "가중치와 편향은 경사 하강을 시작할 때의 값입니다."
    ),
    "Changed: {names}. All numbers are now computed in this page.": (
        "바꾼 값: {names}. 이제 모든 숫자는 이 페이지에서 계산합니다."
    ),
    "by a difference quotient": "차분으로 구한 값",
    "The error by step of descent": "경사 하강 횟수에 따른 오차",
    "The drawing needs JavaScript; the same numbers are in: jaxprop walkthrough": (
        "그림에는 JavaScript가 필요합니다. 같은 숫자를 jaxprop walkthrough가 출력합니다."
    ),
    "Forward to {unit}": "{unit}까지 순전파",
    "What comes in, each times its weight, is added up; the activation makes {unit} of it.": (
        "들어오는 값에 가중치를 곱해 더하고, 활성화 함수를 거치면 {unit}이(가) 됩니다."
    ),
    "The error": "오차",
    "Half the squared distance of each output from its target, added up.": (
        "각 출력과 목표의 거리를 제곱한 것의 절반을 모두 더합니다."
    ),
    "Back to {unit}": "{unit}까지 역전파",
    "The error comes back to {unit} by every weight that it feeds.": (
        "오차는 {unit}에서 나가는 모든 가중치를 거쳐 {unit}(으)로 돌아옵니다."
    ),
    "Back to {weight}": "{weight}까지 역전파",
    "The chain rule along the lit path from the error to {weight}.": (
        "오차에서 {weight}까지 밝게 표시된 길을 따른 연쇄 법칙."
    ),
    "The update": "갱신",
    "Every weight goes down its slope by {rate} times its derivative.": (
        "모든 가중치를 미분값의 {rate}배만큼 기울기 아래로 옮깁니다."
    ),
    "weight": "가중치",
    "old": "이전 값",
    "The new error": "새 오차",
    "Forward again with the new weights: the error fell.": (
        "새 가중치로 다시 순전파: 오차가 줄었습니다."
    ),
    "Forward again with the new weights: the error did not fall.": (
        "새 가중치로 다시 순전파: 오차가 줄지 않았습니다."
    ),
    "Forward through the {layer} layer": "{layer}층 순전파",
    "Back through the {layer} layer": "{layer}층 역전파",
    "What passes through the layer, in a few numbers.": "층을 지나는 값들을 몇 개의 수로.",
    "mean": "평균",
    "rms": "제곱평균제곱근",
    "largest": "최댓값",
    "zeros": "0의 비율",
    "saturated": "포화 비율",
    "weighted sums z": "가중합 z",
    "values": "값",
    "derivatives by the values": "값에 대한 미분",
    "derivatives by the weights": "가중치에 대한 미분",
    "derivatives by the biases": "편향에 대한 미분",
    "{count} unit": "유닛 {count}개",
    "{count} units": "유닛 {count}개",
}


def words(language: Language) -> Say:
    """Return ``say(english, **values)``, which translates into the language.

    Args:
        language: the code of the language.

    Raises:
        KeyError: for a language without a catalogue; from ``say``, for words that are not in it.
    """
    catalogue: dict[str, str] = {"en": {}, "ko": KOREAN}[language]

    def say(english: str, **values: object) -> str:
        known = catalogue[english] if catalogue else english
        filled = known.format(**values) if values else known
        return particles(filled) if language == "ko" else filled

    return say


def particles(text: str) -> str:
    """Return Korean text with each particle in the form that fits the sound before it.

    Args:
        text: the text, in which names such as w3 are read letter by letter and number by number.
    """

    def chosen(match: re.Match[str]) -> str:
        last, written = match.groups()
        after_consonant, after_vowel = PARTICLES[written]
        syllable = ord(last) - ord("가")
        final = syllable % 28 if 0 <= syllable < 11172 else _FINALS.get(last.lower(), 0)
        lateral = written == "(으)로" and final == _LATERAL
        return last + (after_consonant if final and not lateral else after_vowel)

    return re.sub(rf"(.)({'|'.join(map(re.escape, PARTICLES))})", chosen, text)


_LATERAL = 8  # the final consonant ㄹ, after which the particle is 로
_FINALS = dict.fromkeys("036mn", 1) | dict.fromkeys("178lr", _LATERAL)
