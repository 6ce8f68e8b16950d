// What Gradio leaves to the page: chats kept in this browser, export as a file, and names for controls without one.

const namesake = (() => {
  const KEY = "namesake-chats", DRAFT = "namesake-draft", AT_MOST = 50;
  const chinese = (navigator.language || "").startsWith("zh");
  let current = sessionStorage.getItem(KEY); // the chat of this tab, by its id; a reload leaves it open

  let chosen = null; // the kept chat that was clicked last

  const isContent = (content) => typeof content === "string" || (Array.isArray(content) && content.length);
  const isMessage = (message) => ["user", "assistant"].includes(message?.role) && isContent(message.content);
  const isChat = (chat) => chat?.id && Array.isArray(chat.messages) && chat.messages.length && chat.messages.every(isMessage);
  const update = (values) => ({ __type__: "update", ...values });
  const part = ({ content }) => (typeof content === "string" ? content : ((p) => (typeof p === "string" ? p : p?.text))(content?.[0]));
  const plain = (message) => (part(message) || "").replaceAll("<\u2060", "<");

  function read() {
    try {
      return JSON.parse(localStorage.getItem(KEY)).filter(isChat);
    } catch {
      return []; // nothing kept yet, or not by us
    }
  }

  function write(chats) {
    for (let kept = chats.slice(0, AT_MOST); ; kept = kept.slice(0, -1)) {
      try {
        return localStorage.setItem(KEY, JSON.stringify(kept));
      } catch (error) {
        if (!kept.length) return console.warn("Chats cannot be kept in this browser:", error);
      }
    }
  }

  function remember(key, text) {
    try {
      sessionStorage.setItem(key, text);
    } catch (error) {
      console.warn("Nothing can be kept in this browser:", error);
    }
  }

  function list() {
    const title = ({ messages }) => plain(messages[0]).replace(/\s+/g, " ").slice(0, 60);
    return update({ choices: read().map((chat) => [title(chat), chat.id]), value: current || null });
  }

  function keep(messages) {
    if (messages?.length) {
      if (!current) enter(`${Date.now()}-${Math.random().toString(36).slice(2)}`);
      write([{ id: current, messages }, ...read().filter(({ id }) => id !== current)]);
    }
    return [list()];
  }

  function show(messages) {
    return [messages, list()];
  }

  function enter(id) {
    current = id;
    remember(KEY, id);
  }

  function begin() {
    enter("");
    return show([]);
  }

  function forget() {
    write(read().filter(({ id }) => id !== current));
    return begin();
  }

  function choose(id) {
    chosen = id;
    return [];
  }

  function open() {
    enter(chosen);
    return restore();
  }

  function restore() {
    const chat = read().find(({ id }) => id === current);
    return chat ? show(chat.messages) : [update({}), list()];
  }

  // What was being written outlives a reload, the visitor's own or Gradio's after a lost connection.
  addEventListener("pagehide", () => remember(DRAFT, document.querySelector("#message textarea")?.value || ""));

  function draft() {
    const text = sessionStorage.getItem(DRAFT);
    return [update(text ? { value: text } : {})];
  }

  // Gradio's client never reopens a stream of events that broke: the page begins anew once the server is back.
  async function reconnect() {
    const here = async () => (await (await fetch("healthz")).json()).status;
    do await new Promise((resolve) => setTimeout(resolve, 1000)); // a server that goes away may answer once more
    while (!(await here().catch(() => "")));
    location.reload();
  }

  function save(messages, kind) {
    const chat = (messages || []).map((message) => ({ role: message.role, content: plain(message) }));
    const names = chinese ? { user: "我", assistant: "助手" } : { user: "You", assistant: "Assistant" };
    const file =
      kind === "json"
        ? new Blob([JSON.stringify({ messages: chat }, null, 2)], { type: "application/json" })
        : new Blob([chat.map(({ role, content }) => `## ${names[role]}\n\n${content}\n`).join("\n")], { type: "text/markdown" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = `chat-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.${kind === "json" ? "json" : "md"}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function dress() {
    const names = {
      ".submit-button": chinese ? "发送" : "Send",
      ".stop-button": chinese ? "停止" : "Stop",
      ".toggle-button": chinese ? "历史对话" : "Chats",
    };
    for (const [selector, name] of Object.entries(names))
      for (const control of document.querySelectorAll(`${selector}:not([aria-label="${name}"])`)) control.setAttribute("aria-label", name);
    for (const note of document.querySelectorAll('#chat [aria-label*="<small"]')) note.setAttribute("aria-label", note.textContent.trim());
    for (const style of document.querySelectorAll("#chat .message style")) style.remove(); // Gradio 6.2 lets answers have it
    const more = document.querySelector("#continue");
    if (more) more.hidden = ![...document.querySelectorAll("#chat .note")].at(-1)?.classList.contains("cut");
    const root = document.documentElement;
    if (chinese && !root.lang.startsWith("zh")) root.lang = "zh-CN"; // or Chinese is drawn with another language's glyphs
  }

  new MutationObserver(dress).observe(document.documentElement, { childList: true, subtree: true });

  return { restore, draft, keep, begin, forget, choose, open, reconnect, save };
})();
