// Search as you type: the server renders the results, this puts them in place.
const PAUSE_MS = 120;
const input = document.getElementById("q");
const results = document.getElementById("results");
let timer = 0;
let asked = null;

async function search() {
  asked?.abort();
  asked = new AbortController();
  const query = new URLSearchParams({ q: input.value, part: "results" });
  try {
    const response = await fetch(`/?${query}`, {
      signal: asked.signal,
      headers: { accept: "text/html" },
    });
    if (!response.ok || response.redirected) {
      window.location.assign("/");
      return;
    }
    results.innerHTML = await response.text();
    const shown = input.value ? `/?${new URLSearchParams({ q: input.value })}` : "/";
    window.history.replaceState(null, "", shown);
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
}

input.addEventListener("input", () => {
  window.clearTimeout(timer);
  timer = window.setTimeout(search, PAUSE_MS);
});
