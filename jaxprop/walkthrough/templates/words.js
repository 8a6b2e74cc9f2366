// Words in the language that is chosen.

function say(english, values = {}) {
  const korean = state.language === "ko";
  const known = korean ? data.korean[english] : english;
  const filled = known.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  return korean ? withParticles(filled) : filled;
}

// A Korean particle depends on the sound before it: h1은 (il), h2는 (i). Digits and letters are read
// by their names, and the catalogue has both particles, as in 은(는).
function withParticles(korean) {
  for (const [written, [afterConsonant, afterVowel]] of Object.entries(data.particles)) {
    korean = korean.split(written).reduce((text, rest) => {
      const last = text[text.length - 1].toLowerCase();
      const syllable = last.charCodeAt(0) - "가".charCodeAt(0);
      const lateral = syllable >= 0 ? syllable % 28 === 8 : "178lr".includes(last);
      const final = syllable >= 0 ? syllable % 28 > 0 : lateral || "036mn".includes(last);
      return text + (final && !(lateral && written === "(으)로") ? afterConsonant : afterVowel) + rest;
    });
  }
  return korean;
}

function layerName(name) {
  const [kind, number] = name.split("-");
  return number ? say("hidden-{number}", { number }) : say(kind);
}
